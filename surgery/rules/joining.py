"""Operations that put values side by side, or one into another: local unless that is done along the sequence.

cat over H          [B, S/P, H] x 2             -> [B, S/P, 2H]
stack in front      [B, S/P, H] x 2             -> [2, B, S/P, H]
pad of H            [B, S/P, H]                 -> [B, S/P, H + 1]
repeat of heads     [B, N, S/P, H]              -> [B, 2N, S/P, H]
repeat of tokens    [B, S/P, H] twice over S    -> [B, 2*S/P, H]     sharded(1, outer=2): tokens 0 1 2 0 1 2
cat over S                                      -> gathered
"""

from __future__ import annotations

from surgery.placement import REPLICATED, Sharded
from surgery.rules.call import Call, Step, uniform
from surgery.rules.table import rule


@rule("aten::cat", "aten::concat", family="joining")
def cat(call: Call) -> Step | None:
    """An empty tensor of one dim, such as `torch.tensor([])`, goes with any others: whole, as it has no sequence."""
    _, lead = call.lead
    ndim = len(call.shape)
    if lead.dim == call.dim(ndim=ndim):
        return None
    return Step(tuple(lead if len(o.shape) == ndim else REPLICATED for o in call.operands), (lead,))


@rule("aten::stack", family="joining")
def stack(call: Call) -> Step | None:
    _, lead = call.lead
    dim = call.dim(ndim=len(call.shape))
    return Step((lead,) * len(call.operands), (lead.moved_to(lead.dim + (dim <= lead.dim)),))


@rule("aten::constant_pad_nd", "aten::pad", family="joining")
def pad(call: Call) -> Step | None:
    num_padded_dims = len(call.arguments["pad"]) // 2
    if call.source is None or call.source.dim >= len(call.shape) - num_padded_dims:
        return None
    return uniform(call, call.source)


@rule("aten::repeat", family="joining")
def repeat(call: Call) -> Step | None:
    if call.source is None:
        return None
    repeats = call.arguments["repeats"]
    dim = call.source.dim + len(repeats) - len(call.operands[0].shape)
    if not isinstance(repeats[dim], int):
        return None
    return Step((call.source,), (Sharded(dim, repeats[dim] * call.source.outer, call.source.inner),))


@rule("aten::slice_scatter", family="joining")
def slice_scatter(call: Call) -> Step | None:
    """`x[..., 2:4] = y`, both sharded alike."""
    _, lead = call.lead
    return uniform(call, lead) if lead.dim != call.dim() else None


@rule("aten::select_scatter", family="joining")
def select_scatter(call: Call) -> Step | None:
    """`x[..., 2] = y`: `y` lacks the dimension."""
    target, source = call.operand("self"), call.operand("src")
    if target is None or source is None or target.node is source.node:
        return None
    operand, lead = call.lead
    dim = call.dim(ndim=len(call.shape))
    whole = lead if operand is target else lead.moved_to(lead.dim + (dim <= lead.dim))
    if whole.dim == dim:
        return None
    return call.step({target.node: whole, source.node: whole.moved_to(whole.dim - (dim < whole.dim))}, whole)
