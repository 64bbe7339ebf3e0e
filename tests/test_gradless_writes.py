"""What a model does where autograd does not look, under no_grad, inference_mode or vmap, is exact all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from surgery import restore, transform
from surgery.verify.comparison import run_sharded, run_whole
from tests.planted import plant
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model


def clamped(x: Tensor) -> Tensor:
    y = x * 2
    with torch.no_grad():
        y[..., :8].clamp_(-1, 1)
    return y


def scaled_detached(x: Tensor) -> Tensor:
    y = x * 2
    y.detach().mul_(3)
    return y


def inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        mean = x.mean(1, keepdim=True)
    return x - mean.clone()


def mapped(x: Tensor) -> Tensor:
    return torch.vmap(lambda sequence: sequence.softmax(0))(x) + x


def written_under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        shifted = torch.zeros_like(x)
        shifted[:, 1:] = x[:, :-1]
    return x + shifted


def read_beside_a_write(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 0] = 1.0
    with torch.no_grad():
        mean = x.mean(1, keepdim=True)
    return y + mean


def written_afterwards(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    y[..., 0] = x[..., 1]
    return y + x


def cast_under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        same = x.float()
    return same * 2


def checkpointed(x: Tensor) -> Tensor:
    return x + torch.as_tensor(checkpoint(lambda y: y.softmax(1), x, use_reentrant=True))


TRACED = [inferred, written_under_no_grad, read_beside_a_write, cast_under_no_grad, checkpointed]
CALLED_WHOLE = [clamped, scaled_detached, written_afterwards, mapped]
SAMPLE = {written_under_no_grad, cast_under_no_grad, inferred, clamped}


def _make(function: Callable[[Tensor], Tensor]) -> Any:
    return plant(make_model("llama"), lambda x, weight: function(x @ weight))


def _prove(function: Callable[[Tensor], Tensor], sp_size: int) -> tuple[dict[str, float], bool]:
    """The errors on this rank, and whether the function's module is called whole."""
    model, batch = _make(function), make_batch(2, 13)
    reference = run_whole(copy.deepcopy(model), batch)
    transform(model, sp_size, example=batch)
    errors = run_sharded(model, reference, batch)
    is_called_whole = "Planted" in str(model.surgery.report())
    restore(model)
    return errors, is_called_whole


@pytest.mark.parametrize("function", sampled([*TRACED, *CALLED_WHOLE], SAMPLE))
def test_exact(world: World, function: Callable[[Tensor], Tensor]) -> None:
    results = world.run(_prove, function, world.sp_size)
    assert_exact([errors for errors, _ in results])
    assert all(is_called_whole == (function in CALLED_WHOLE) for _, is_called_whole in results)


def _prove_captured_without_gradients(sp_size: int) -> dict[str, float]:
    model, batch = _make(read_beside_a_write), make_batch(2, 13)
    reference = run_whole(copy.deepcopy(model), batch)
    with torch.no_grad():
        transform(model, sp_size)(**batch)
    errors = run_sharded(model, reference, batch)
    restore(model)
    return errors


def test_captured_for_a_call_without_gradients(world: World) -> None:
    """The same program serves calls with gradients."""
    assert_exact(world.run(_prove_captured_without_gradients, world.sp_size))
