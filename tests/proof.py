"""The proof every capability lands with: loss, logits and unscaled gradients equal the unsharded model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from surgery import restore, transform
from tests.zoo import make_batch, make_model

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# A gradient that is zero in exact arithmetic (the bias of the keys: softmax does not see it) is rounding noise in
# both models. Gradients are therefore measured against at least this share of the model's largest one.
SMALLEST_SHARE = 1e-3


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest expected value, which is taken to be at least `floor`."""
    scale = expected.abs().max().clamp(min=max(floor, torch.finfo(expected.dtype).tiny))
    return float(((found - expected).abs().max() / scale).item())


def gradients_of(model: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Every parameter's gradient, averaged over `group` as DDP would."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if group is not None:
            dist.all_reduce(gradient, group=group)
            gradient /= group.size()
        gradients[name] = gradient
    return gradients


def compare(
    model: Any,
    sp_size: int,
    batch: dict[str, Any],
    *,
    run: Callable[..., Any] | None = None,
    scale: float = 1.0,
    **options: Any,
) -> dict[str, float]:
    """Run `model` whole and transformed on `batch`: the relative errors of loss, logits and every gradient.

    The ranks' gradients are averaged and multiplied by `scale`: P for `gradients="sum"`.
    """
    reference = copy.deepcopy(model)
    expected = reference(**batch, use_cache=False)
    transform(model, sp_size, **options)
    found = (run if run is not None else model)(**batch)
    group = model.surgery.mpu.get_sequence_parallel_group()
    errors = {"logits": relative_error(model.surgery.gather(found.logits), expected.logits)}
    if expected.loss is not None:
        errors["loss"] = relative_error(found.loss, expected.loss)
        expected.loss.backward()
        found.loss.backward()
        whole = gradients_of(reference)
        floor = SMALLEST_SHARE * max(float(gradient.abs().max()) for gradient in whole.values())
        for name, gradient in gradients_of(model, group).items():
            errors[name] = relative_error(gradient * scale, whole[name], floor)
    restore(model)
    return errors


def prove(
    name: str,
    sp_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 2,
    length: int = 32,
    is_training: bool = True,
    batch: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, float]:
    """The errors of one architecture of the zoo, on this rank."""
    model = make_model(name, dtype=dtype, **changes).train(is_training)
    with float_is_double() if dtype == torch.float64 else nullcontext():
        return compare(model, sp_size, make_batch(batch_size, length) if batch is None else batch)


@contextmanager
def float_is_double() -> Iterator[None]:
    """Let `x.float()` keep float64: transformers computes losses, and gemma its norms, in float32 whatever the dtype.

    Both models would round to 1e-7 there, in different orders of summation, and hide what a float64 proof is to show.
    """
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def worst(errors: dict[str, float]) -> tuple[float, str]:
    """The largest error and what has it; NaN counts as the largest."""
    return max((float("inf") if error != error else error, name) for name, error in errors.items())


def assert_exact(results: list[dict[str, float]], dtype: torch.dtype = torch.float32) -> None:
    """Every rank's errors are within the tolerance of `dtype`."""
    for rank, errors in enumerate(results):
        error, name = worst(errors)
        assert error <= TOLERANCE[dtype], f"rank {rank}: {name} is off by {error:.2e} (allowed {TOLERANCE[dtype]:.0e})"
