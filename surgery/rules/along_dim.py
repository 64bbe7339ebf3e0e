"""Operations that work along one dimension: local unless that dimension holds the sequence.

softmax over keys   [B, N, S/P, S]  -> the same, row by row
chunk over H        [B, S/P, 2H]    -> 2 x [B, S/P, H]
cumsum, roll, sort over S           -> gathered: they mix tokens
"""

from __future__ import annotations

from surgery.placement import REPLICATED, Placement, Sharded
from surgery.rules.call import Call, Step, uniform
from surgery.rules.pointwise import align
from surgery.rules.table import rule

KEEPS_DIMS = (
    "aten::_log_softmax",
    "aten::_softmax",
    "aten::argsort",
    "aten::chunk",
    "aten::cummax",
    "aten::cummin",
    "aten::cumprod",
    "aten::cumsum",
    "aten::diff",
    "aten::glu",
    "aten::log_softmax",
    "aten::logcumsumexp",
    "aten::narrow",
    "aten::slice",
    "aten::softmax",
    "aten::sort",
    "aten::split",
    "aten::split_with_sizes",
    "aten::tensor_split",
    "aten::topk",
)


@rule(*KEEPS_DIMS, family="along-dim")
def along_dim(call: Call) -> Step | None:
    placement = call.operands[0].placement
    if len(call.operands) > 1 or call.arguments.get("dim") is None:
        return None
    if not isinstance(placement, Sharded) or placement.dim == call.dim():
        return None
    return uniform(call, placement)


@rule("aten::select", "aten::unbind", family="along-dim")
def take_out(call: Call) -> Step | None:
    placement = call.operands[0].placement
    dim = call.dim()
    if not isinstance(placement, Sharded) or placement.dim == dim:
        return None
    result = placement.moved_to(placement.dim - (dim < placement.dim))
    return Step((placement,), (result,) * len(call.results))


@rule("aten::flip", "aten::roll", family="along-dim")
def reorder(call: Call) -> Step | None:
    placement = call.operands[0].placement
    ndim = len(call.operands[0].shape)
    dims = {int(dim) % ndim for dim in call.arguments["dims"]}
    if not dims or not isinstance(placement, Sharded) or placement.dim in dims:
        return None
    return uniform(call, placement)


@rule("aten::cat", "aten::concat", family="along-dim")
def cat(call: Call) -> Step | None:
    """An empty tensor of one dim, such as `torch.tensor([])`, goes with any others: whole, as it has no sequence."""
    lead, ndim = call.sharded[0].placement, len(call.shape)
    if not isinstance(lead, Sharded) or lead.dim == call.dim(ndim=ndim):
        return None
    return Step(tuple(lead if len(o.shape) == ndim else REPLICATED for o in call.operands), (lead,))


@rule("aten::stack", family="along-dim")
def stack(call: Call) -> Step | None:
    lead = call.sharded[0].placement
    assert isinstance(lead, Sharded)
    dim = call.dim(ndim=len(call.shape))
    return Step((lead,) * len(call.operands), (lead.moved_to(lead.dim + (dim <= lead.dim)),))


@rule("aten::constant_pad_nd", "aten::pad", family="along-dim")
def pad(call: Call) -> Step | None:
    placement = call.operands[0].placement
    padded = len(call.arguments["pad"]) // 2
    if not isinstance(placement, Sharded) or placement.dim >= len(call.shape) - padded:
        return None
    return uniform(call, placement)


@rule("aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm", family="along-dim")
def normalize(call: Call) -> Step | None:
    source = call.operands[0]
    normalized = len(call.arguments["normalized_shape"])
    placement = source.placement
    if not isinstance(placement, Sharded) or placement.dim >= len(source.shape) - normalized:
        return None
    operands: list[Placement] = [placement]
    operands += [align(operand, placement, len(source.shape)) for operand in call.operands[1:]]
    return Step(tuple(operands), (placement,) * len(call.results))


@rule("aten::repeat", family="along-dim")
def repeat(call: Call) -> Step | None:
    placement = call.operands[0].placement
    if not isinstance(placement, Sharded):
        return None
    repeats = call.arguments["repeats"]
    dim = placement.dim + len(repeats) - len(call.operands[0].shape)
    if not isinstance(repeats[dim], int):
        return None
    return Step((placement,), (Sharded(dim, repeats[dim] * placement.outer, placement.inner),))


@rule("aten::view_as_complex", "aten::view_as_real", family="along-dim")
def pair(call: Call) -> Step | None:
    """The last dimension, of two numbers each, becomes one of complex numbers, or comes out of one."""
    placement = call.operands[0].placement
    is_last = isinstance(placement, Sharded) and placement.dim == len(call.operands[0].shape) - 1
    is_consumed = is_last and len(call.shape) < len(call.operands[0].shape)
    return None if is_consumed else uniform(call, placement)


@rule("aten::slice_scatter", family="along-dim")
def slice_scatter(call: Call) -> Step | None:
    lead = call.sharded[0].placement
    return uniform(call, lead) if isinstance(lead, Sharded) and lead.dim != call.dim() else None


@rule("aten::select_scatter", family="along-dim")
def select_scatter(call: Call) -> Step | None:
    target, source = call.operand("self"), call.operand("src")
    if target is None or source is None or target.node is source.node:
        return None
    dim, lead = call.dim(ndim=len(call.shape)), call.sharded[0].placement
    assert isinstance(lead, Sharded)
    whole = lead if call.sharded[0] is target else lead.moved_to(lead.dim + (dim <= lead.dim))
    if whole.dim == dim:
        return None
    required: dict[object, Placement] = {target.node: whole, source.node: whole.moved_to(whole.dim - (dim < whole.dim))}
    return Step(tuple(required[operand.node] for operand in call.operands), (whole,))


@rule("aten::repeat_interleave", family="along-dim")
def repeat_interleave(call: Call) -> Step | None:
    placement = call.operands[0].placement
    if len(call.operands) > 1 or not isinstance(placement, Sharded):
        return None
    if call.arguments.get("dim") is None or placement.dim == call.dim():
        return None
    return uniform(call, placement)
