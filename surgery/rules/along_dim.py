"""Operations that work along one dimension: local unless that dimension holds the sequence.

softmax over keys   [B, N, S/P, S]  -> the same, row by row
chunk over H        [B, S/P, 2H]    -> 2 x [B, S/P, H]
select of a head    [B, N, S/P, H]  -> [B, S/P, H]
cumsum, roll, sort over S           -> gathered: they mix tokens
"""

from __future__ import annotations

from surgery.rules.call import Call, Step, uniform
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
    "aten::repeat_interleave",
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
    """`[B, S/P, H] -> [B, S/P, H']` along the last dimension; one or more results."""
    is_along_all = call.arguments.get("dim") is None
    if call.source is None or len(call.operands) > 1 or is_along_all or call.source.dim == call.dim():
        return None
    return uniform(call, call.source)


@rule("aten::select", "aten::unbind", family="along-dim")
def take_out(call: Call) -> Step | None:
    """`[B, N, S/P, H] -> [B, S/P, H]`: the dimension is gone from the results."""
    if call.source is None or call.source.dim == call.dim():
        return None
    result = call.source.moved_to(call.source.dim - (call.dim() < call.source.dim))
    return Step((call.source,), (result,) * len(call.results))


@rule("aten::flip", "aten::roll", family="along-dim")
def reorder(call: Call) -> Step | None:
    """Along several dimensions, or along all of a flat view where none is named."""
    dims = {int(dim) % len(call.shape) for dim in call.arguments["dims"]}
    if call.source is None or not dims or call.source.dim in dims:
        return None
    return uniform(call, call.source)


@rule("aten::view_as_complex", "aten::view_as_real", family="along-dim")
def pair(call: Call) -> Step | None:
    """`[B, S/P, H, 2] <-> [B, S/P, H]` of complex numbers: a last dimension of two comes, or goes."""
    before, after = len(call.operands[0].shape), len(call.shape)
    if call.source is None or (after < before and call.source.dim == before - 1):
        return None
    return uniform(call, call.source)
