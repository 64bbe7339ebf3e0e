"""Lookups: local where the table is whole on every rank, or the sequence is not the dimension looked up in.

embedding     [V, H][ids [B, S/P]]             -> [B, S/P, H]
rotary cache  [T, H][positions [B, S/P]]       -> [B, S/P, H]
gather        [B, S/P, E], index [B, S/P, k]   -> [B, S/P, k]    along E; scatter the other way
"""

from __future__ import annotations

import torch

from surgery.placement import REPLICATED, Sharded
from surgery.rules.call import Call, Step, uniform
from surgery.rules.table import rule

MASKS = (torch.bool, torch.uint8)
"""As indices they choose entries, each by its place, instead of naming them."""


@rule("aten::embedding", family="indexing")
def embedding(call: Call) -> Step | None:
    """`[V, H], ids [B, S/P] -> [B, S/P, H]`; how often an id occurs is known of the whole only."""
    weight, indices = call.operand("weight"), call.operand("indices")
    if weight is None or indices is None or not isinstance(indices.placement, Sharded) or weight.is_sharded:
        return None
    if call.arguments.get("scale_grad_by_freq"):
        return None
    return call.step({weight.node: REPLICATED, indices.node: indices.placement}, indices.placement)


@rule("aten::one_hot", family="indexing")
def one_hot(call: Call) -> Step | None:
    return uniform(call, call.operands[0].placement)


@rule("aten::gather", "aten::scatter", "aten::scatter_add", family="indexing")
def gather(call: Call) -> Step | None:
    """`[B, S/P, E], index [B, S/P, k] -> [B, S/P, k]`: each token looks up in its own entries."""
    operand, lead = call.lead
    if call.arguments.get("dim") is None or lead.dim == call.dim():
        return None
    has_same_length = all(other.shape[lead.dim] == operand.shape[lead.dim] for other in call.operands)
    is_distinct = len(call.operands) > 1  # where one tensor is all of them, it is looked up in itself
    return uniform(call, lead) if has_same_length and is_distinct else None


@rule("aten::index", family="indexing")
def index(call: Call) -> Step | None:
    """`table[positions]`, `[T, H], [B, S/P] -> [B, S/P, H]`, of a table that is whole, by one index."""
    table, *indices = call.operands
    given = [i for i, entry in enumerate(call.arguments["indices"]) if entry is not None]
    if table.is_sharded or len(indices) != 1 or len(given) != 1 or call.arguments["indices"][given[0]] is table.node:
        return None
    placement = indices[0].placement
    if not isinstance(placement, Sharded) or indices[0].node.meta["val"].dtype in MASKS:
        return None
    return Step((REPLICATED, placement), (placement.moved_to(placement.dim + given[0]),))


@rule("aten::index_select", family="indexing")
def index_select(call: Call) -> Step | None:
    """`[B, S/P, H], index [k] -> [B, S/P, k]`."""
    if len(call.operands) != 2 or call.source is None or call.source.dim == call.dim():
        return None
    return Step((call.source, REPLICATED), (call.source,))
