"""A model whole and transformed, side by side: how far loss, outputs and every unscaled gradient are apart.

    reference = run_whole(model, batch)                 one device, the model as it is
    errors    = run_sharded(model, reference, ...)      P ranks:  {"loss": 1e-8, "logits": 3e-7, "lm_head.weight": ...}
    errors    = run_simulated(model, reference, ...)    the same, by threads of this process

Errors are relative: the largest difference over the largest expected value. The one definition, for `surgery verify`,
the sweep and the tests.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.api import restore, transform
from surgery.verify.simulation import run_model

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# A gradient that is zero in exact arithmetic (the bias of the keys: softmax does not see it) is rounding noise in
# both models. Gradients are therefore measured against at least this share of the model's largest one.
SMALLEST_SHARE = 1e-3

KEEPING_DOUBLE = (
    (Tensor, "to"),
    (Tensor, "softmax"),
    (F, "softmax"),
    (torch, "softmax"),
    (Tensor, "sum"),
    (torch, "sum"),
)
"""What models tell to compute in float32."""


@dataclass(frozen=True)
class Reference:
    """What the unsharded model computes: its outputs by name, and every parameter's gradient where there is a loss."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest expected value, which is taken to be at least `floor`."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp(min=max(floor, torch.finfo(expected.dtype).tiny))
    return float(((found - expected).abs().max() / scale).item())


def largest(errors: Iterable[float]) -> float:
    """The largest of errors; NaN is infinite."""
    return max(float("inf") if error != error else error for error in errors)


def worst(errors: dict[str, float]) -> tuple[float, str]:
    """The largest error and what has it."""
    return max((largest([error]), name) for name, error in errors.items())


def gradients_of(model: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Every parameter's gradient, averaged over `group` as DDP would."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        gradients[name] = gradient if group is None else _average(gradient, group)
    return gradients


def _average(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    """On the host where the group is gloo's."""
    carried = gradient.cpu() if dist.get_backend(group) == "gloo" else gradient
    dist.all_reduce(carried, group=group)
    return carried.to(gradient.device) / group.size()


def compare(
    model: Any,
    sp_size: int,
    batch: dict[str, Any],
    *,
    run: Callable[..., Any] | None = None,
    scale: float = 1.0,
    **options: Any,
) -> dict[str, float]:
    """Run `model` whole and transformed on `batch`: the relative errors of loss, outputs and every gradient.

    The ranks' gradients are averaged and multiplied by `scale`: P for `gradients="sum"`. The model is restored.
    """
    reference = run_whole(copy.deepcopy(model), batch)
    transform(model, sp_size, **{"example": batch, **options})
    errors = run_sharded(model, reference, batch, run=run, scale=scale)
    restore(model)
    return errors


def run_whole(model: nn.Module, batch: Mapping[str, Any]) -> Reference:
    """Forward and backward of the model as it is."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    outputs = _tensors(model(**batch, **{"use_cache": False} if takes_cache else {}))
    if "loss" in outputs:
        outputs["loss"].backward()
    detached = {name: value.detach() for name, value in outputs.items()}
    return Reference(detached, gradients_of(model) if "loss" in outputs else {})


def run_sharded(
    model: Any,
    reference: Reference,
    batch: Mapping[str, Any],
    *,
    run: Callable[..., Any] | None = None,
    scale: float = 1.0,
) -> dict[str, float]:
    """Forward and backward of the transformed model: its relative errors, by output and parameter."""
    found = _tensors((run if run is not None else model)(**batch))
    errors = {
        name: relative_error(*_at_tokens(_whole(model, found[name], expected), expected, batch))
        for name, expected in reference.outputs.items()
    }
    if reference.gradients:
        found["loss"].backward()
        gradients = gradients_of(model, model.surgery.mpu.get_sequence_parallel_group())
        errors |= _gradient_errors({name: gradient * scale for name, gradient in gradients.items()}, reference)
    return errors


def run_simulated(model: Any, reference: Reference, batch: Mapping[str, Any]) -> dict[str, float]:
    """The same for a model transformed without a process group, its ranks simulated in this process."""
    by_rank = [_tensors(outputs) for outputs in run_model(model, batch)]
    errors = {}
    for name, expected in reference.outputs.items():
        found = [values[name] for values in by_rank]
        wholes = found if all(value.shape == expected.shape for value in found) else [_joined(found, expected)]
        errors[name] = largest(relative_error(*_at_tokens(whole, expected, batch)) for whole in wholes)
    if reference.gradients:
        torch.stack([values["loss"] for values in by_rank]).mean().backward()
        errors |= _gradient_errors(gradients_of(model), reference)
    return errors


def _gradient_errors(found: dict[str, Tensor], reference: Reference) -> dict[str, float]:
    expected = reference.gradients
    floor = SMALLEST_SHARE * max(float(gradient.abs().max()) for gradient in expected.values() if gradient.numel() > 0)
    return {name: relative_error(gradient, expected[name], floor) for name, gradient in found.items()}


@contextmanager
def float_is_double() -> Iterator[None]:
    """Let casts of float64 to float32 keep it: transformers computes losses, and gemma its norms, in float32.

    Both models would round to 1e-7 there, in different orders of summation, and hide what a float64 proof is to show.
    Integers, such as positions, become float32 all the same: transformers multiplies them with float32 frequencies.
    Where those are kept in float64, as a buffer is, a matrix product of the two is too (transformers 5.17).
    """
    to_float32 = Tensor.float

    def to_float(x: Tensor, **options: Any) -> Tensor:
        return x if x.dtype == torch.float64 else to_float32(x, **options)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "float", to_float))
        for owner, name in KEEPING_DOUBLE:
            stack.enter_context(mock.patch.object(owner, name, _keeping_double(getattr(owner, name))))
        stack.enter_context(mock.patch.object(Tensor, "__matmul__", _promoted_product))
        yield


def _promoted_product(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.matmul(a.to(dtype), b.to(dtype))


def _keeping_double(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, which takes a `dtype` of float32 for float64 where it is given a tensor of that."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if x.dtype != torch.float64:
            return function(*args, **kwargs)
        given = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return function(*given, **named)

    return call


def _tensors(output: Any) -> dict[str, Tensor]:
    """The floating tensors of a model's output class that stand at its top."""
    return {n: v for n, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def _joined(shards: list[Tensor], expected: Tensor) -> Tensor:
    return torch.cat(shards, dim=_sharded_dim(shards[0], expected))


def _whole(model: Any, value: Tensor, expected: Tensor) -> Tensor:
    return value if value.shape == expected.shape else model.surgery.gather(value, _sharded_dim(value, expected))


def _sharded_dim(shard: Tensor, expected: Tensor) -> int:
    """The dimension in which a shard is shorter than the whole."""
    return next(dim for dim in range(expected.ndim) if shard.shape[dim] != expected.shape[dim])


def _at_tokens(found: Tensor, expected: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Without the places of padding, where a model computes what nobody reads."""
    padding = batch.get("attention_mask")
    if padding is None or padding.ndim != 2 or expected.shape[:2] != padding.shape:
        return found, expected
    return found[padding.bool()], expected[padding.bool()]
