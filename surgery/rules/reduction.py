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

from surgery.placement import PARTIAL, Sharded
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
    placement = call.operands[0].placement
    assert isinstance(placement, Sharded)
    removed = 0 if call.arguments.get("keepdim") else sum(dim < placement.dim for dim in dims)
    return Step((placement,), (placement.moved_to(placement.dim - removed),) * len(call.results))


@rule(*REDUCTIONS, family="reduction")
def reduce(call: Call) -> Step | None:
    if "other" in call.arguments:
        return pointwise(call)
    dims = reduced_dims(call)
    placement = call.operands[0].placement
    if len(call.operands) > 1 or not isinstance(placement, Sharded) or placement.dim in dims:
        return None
    return kept(call, dims)


@rule("aten::sum", family="reduction")
def sum_(call: Call) -> Step | None:
    dims = reduced_dims(call)
    placement = call.operands[0].placement
    assert isinstance(placement, Sharded)
    return Step((placement,), (PARTIAL,)) if placement.dim in dims else kept(call, dims)


@rule("aten::mean", family="reduction")
def mean(call: Call) -> Step | None:
    dims = reduced_dims(call)
    placement = call.operands[0].placement
    assert isinstance(placement, Sharded)
    if placement.dim not in dims:
        return kept(call, dims)
    count = product(call.operands[0].shape[dim] for dim in dims)
    return Step((placement,), (PARTIAL,), replacement=mean_addend, numbers=(("count", count),))


def mean_addend(
    self: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, count: int
) -> Tensor:
    """This rank's addend of a mean over `count` elements of the whole, summed in float32 at least."""
    result = self.dtype if dtype is None else dtype
    precise = torch.promote_types(result, torch.float32)
    local = self.sum(dtype=precise) if dim is None else self.sum(dim, keepdim, dtype=precise)
    return (local / count).to(result)
