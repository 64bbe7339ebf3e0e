"""Attention calls: query, key and value come in sharded over the sequence and the output leaves so.

    [B, N, S/P, H] x 3  --exchange-->  [B, N/P, S, H] x 3  --attention-->  [B, N/P, S, H]  --exchange-->  [B, N, S/P, H]

In cross-attention keys and values are as many as the encoder's tokens, and shards of those. Where their number is no
sequence's length (the frames of a sound) they are whole on every rank, which takes the heads it needs.

The exchange itself is inserted later, by `passes/insert_all_to_all.py`. Masks stay whole on every rank.
"""

from __future__ import annotations

from surgery.placement import REPLICATED, Placement, Sharded
from surgery.rules.call import Call, Step
from surgery.rules.table import rule

SEQUENCE_DIM = 2


@rule("surgery::attention", family="attention")
def attention(call: Call) -> Step | None:
    query, *memory = [call.operand(name) for name in ("query", "key", "value")]
    if query is None or query.shape[SEQUENCE_DIM] not in call.lengths:
        return None
    tokens = [operand for operand in (query, *memory) if operand is not None]
    exchanged = {operand.node for operand in tokens if operand.shape[SEQUENCE_DIM] in call.lengths}
    operands: tuple[Placement, ...] = tuple(
        Sharded(SEQUENCE_DIM) if operand.node in exchanged else REPLICATED for operand in call.operands
    )
    return Step(operands, (Sharded(SEQUENCE_DIM),))
