"""What a model does where autograd does not look, under no_grad, inference_mode or vmap, is exact all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery import transform
from surgery.verify.comparison import run_simulated, run_whole
from surgery.verify.simulation import run_model
from tests.proof import assert_exact
from tests.sampling import sampled
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


class Snippet(nn.Module):
    def __init__(self, inner: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(self.function(x)))


def make_snippet(function: Callable[[Tensor], Tensor]) -> Any:
    model = make_model("llama", num_hidden_layers=1)
    model.model.layers[0].mlp = Snippet(model.model.layers[0].mlp, function)
    return model


TRACED = [
    inferred,
    written_under_no_grad,
    read_beside_a_write,
    cast_under_no_grad,
    checkpointed,
]
CALLED_WHOLE = [clamped, scaled_detached, written_afterwards, mapped]


SAMPLE = {written_under_no_grad, cast_under_no_grad, inferred, clamped, mapped}


@pytest.mark.parametrize("function", sampled([*TRACED, *CALLED_WHOLE], SAMPLE))
def test_exact(function: Callable[[Tensor], Tensor]) -> None:
    model, batch = make_snippet(function), make_batch(2, 13)
    twin = transform(copy.deepcopy(model), 3)
    assert_exact([run_simulated(twin, run_whole(model, batch), batch)])
    assert ("Snippet" in str(twin.surgery.report())) == (function in CALLED_WHOLE)


def test_captured_for_a_call_without_gradients() -> None:
    """The same program serves calls with gradients."""
    model, batch = make_snippet(read_beside_a_write), make_batch(2, 13)
    with torch.no_grad():
        twin = transform(copy.deepcopy(model), 3)
        run_model(twin, batch)
    assert_exact([run_simulated(twin, run_whole(model, batch), batch)])
