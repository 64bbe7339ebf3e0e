"""Operations that treat every element alone: they run on shards as they are.

    [B, S/P, H] * [H]             ->  [B, S/P, H]
    [B, N, S/P, H] * [1, 1, S, H]  ->  the second operand is sliced to [1, 1, S/P, H]

Everything torch tags `pointwise` is served here; the operations named below are pointwise (or copies) without the tag.
"""

from __future__ import annotations

from sympy import Expr

from surgery.placement import ONE, REPLICATED, Placement, Sharded
from surgery.rules.call import Call, Operand, Step
from surgery.rules.table import rule

UNTAGGED = (
    "aten::alias",
    "aten::clone",
    "aten::complex",
    "aten::contiguous",
    "aten::detach",
    "aten::empty_like",
    "aten::full_like",
    "aten::hardtanh",
    "aten::lift_fresh_copy",
    "aten::masked_fill",
    "aten::ones_like",
    "aten::polar",
    "aten::silu",
    "aten::softplus",
    "aten::to",
    "aten::where",
    "aten::zeros_like",
    "aten::_to_copy",
)
CHANNEL_DIM = 1


def aligned_dim(operand: Operand, result_dim: int, result_ndim: int) -> int | None:
    """The dimension of `operand` that broadcasting aligns with `result_dim`, or None if it has size 1 or is missing."""
    dim = result_dim - (result_ndim - len(operand.shape))
    return dim if dim >= 0 and operand.shape[dim] != ONE else None


def align(operand: Operand, result: Sharded, result_ndim: int) -> Placement:
    """What `operand` must be so that broadcasting it gives `result`."""
    dim = aligned_dim(operand, result.dim, result_ndim)
    return REPLICATED if dim is None else result.moved_to(dim)


def _fits(operand: Operand, size: Expr, result_dim: int, result_ndim: int) -> bool:
    """Whether the sequence of `operand` is plainly the result's, and not a size that only turns out to broadcast."""
    dim = aligned_dim(operand, result_dim, result_ndim)
    return dim is None or operand.shape[dim] == size


@rule("pointwise", *UNTAGGED, family="pointwise")
def pointwise(call: Call) -> Step | None:
    operand, lead = call.lead
    ndim = len(call.shape)
    result = lead.moved_to(lead.dim + ndim - len(operand.shape))
    if not all(_fits(operand, call.shape[result.dim], result.dim, ndim) for operand in call.operands):
        return None
    operands = tuple(align(operand, result, ndim) for operand in call.operands)
    return Step(operands, (result,) * len(call.results))


@rule("aten::type_as", family="pointwise")
def type_as(call: Call) -> Step | None:
    """Of its second operand nothing but the dtype is read: it may have any shape, and stays as it is."""
    value, other = (operand.placement for operand in call.operands)
    kept = value if isinstance(value, Sharded) else REPLICATED  # a cast of addends is not an addend of the cast
    return Step((kept, other), (kept,))


@rule("aten::prelu", family="pointwise")
def prelu(call: Call) -> Step | None:
    """Its weight has one number, or one for each entry of dim 1, whatever that is aligned with."""
    weight = call.operands[1]
    if call.source is None:
        return None
    is_of_tokens = call.source.dim == CHANNEL_DIM and weight.shape != (ONE,)
    return Step((call.source, call.source.moved_to(0) if is_of_tokens else REPLICATED), (call.source,))
