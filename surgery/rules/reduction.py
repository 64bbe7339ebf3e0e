"""Reductions: local over other dimensions, a partial sum over the sequence where the operation is linear.

mean over H   [B, S/P, H] -> [B, S/P]
sum over S    [B, S/P, H] -> [B, H]      a partial sum, all-reduced before anything else sees it
mean over S   [B, S/P, H] -> [B, H]      the local sum over the count of the whole, and then as a sum
max over S                               gathered
max(x, y)                                pointwise, as any operation on two tensors
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.placement import PARTIAL
from surgery.rules.call import Call, Step
from surgery.rules.pointwise import pointwise
from surgery.rules.table import rule
from surgery.shapes import product

REDUCTIONS = (
    "aten::all",
    "aten::amax",
    "aten::amin",
    "aten::any",
    "aten::argmax",
    "aten::argmin",
    "aten::count_nonzero",
    "aten::linalg_vector_norm",
    "aten::logsumexp",
    "aten::max",
    "aten::median",
    "aten::min",
    "aten::mode",
    "aten::norm",
    "aten::prod",
    "aten::std",
    "aten::var",
    "aten::var_mean",
)


def reduced_dims(call: Call) -> tuple[int, ...]:
    """The dimensions that the reduction removes: all of them where none is named."""
    ndim = len(call.operands[0].shape)
    dims = call.arguments.get("dim")
    if dims is None or dims == []:
        return tuple(range(ndim))
    return tuple(int(dim) % ndim for dim in (dims if isinstance(dims, (list, tuple)) else [dims]))


def kept(call: Call, dims: tuple[int, ...]) -> Step:
    """The step of a reduction that leaves the sharded dimension alone."""
    _, source = call.lead
    removed = 0 if call.arguments.get("keepdim") else sum(dim < source.dim for dim in dims)
    return Step((source,), (source.moved_to(source.dim - removed),) * len(call.results))


@rule(*REDUCTIONS, family="reduction")
def reduce(call: Call) -> Step | None:
    """`[B, S/P, H] -> [B, S/P]` over H; over S nothing of theirs adds up."""
    if "other" in call.arguments:
        return pointwise(call)
    dims = reduced_dims(call)
    if call.source is None or len(call.operands) > 1 or call.source.dim in dims:
        return None
    return kept(call, dims)


@rule("aten::sum", family="reduction")
def sum_(call: Call) -> Step | None:
    """Over S: `[B, S/P, H] -> [B, H]`, an addend on each rank."""
    _, source = call.lead
    dims = reduced_dims(call)
    return Step((source,), (PARTIAL,)) if source.dim in dims else kept(call, dims)


@rule("aten::mean", family="reduction")
def mean(call: Call) -> Step | None:
    """Over S: the local sum / S, not / (S/P), so that the addends add up."""
    operand, source = call.lead
    dims = reduced_dims(call)
    if source.dim not in dims:
        return kept(call, dims)
    count = product(operand.shape[dim] for dim in dims)
    return Step((source,), (PARTIAL,), replacement=mean_addend, numbers=(("count", count),))


def mean_addend(
    self: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, count: int
) -> Tensor:
    """This rank's addend of a mean over `count` elements of the whole, summed in float32 at least."""
    result = self.dtype if dtype is None else dtype
    precise = torch.promote_types(result, torch.float32)
    local = self.sum(dtype=precise) if dim is None else self.sum(dim, keepdim, dtype=precise)
    return (local / count).to(result)
