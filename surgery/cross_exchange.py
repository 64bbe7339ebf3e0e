"""The exchange around cross-attention, whose queries are T tokens and whose keys and values are S others.

    q    [B, N,  T/P, H] --exchange_queries-->  [B, N/P, T, H]      one all-to-all
    k, v [B, Nk, S/P, H] --exchange_keys-->     [B, Nk/P, S, H]     another, packed
    k, v [B, Nk, S, H]   --take_own_keys-->     [B, Nk/P, S, H]     none, where they are whole on every rank

The output travels back as that of any attention call: `surgery/exchange.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.axis import Axis, run_lengths
from surgery.collectives import split_dim
from surgery.head_plan import HeadPlan
from surgery.private import all_to_all_runs


def exchange_queries(query: Tensor, length: int, axis: Axis) -> Tensor:
    """Trade the queries' sequence shards for head shards: `[B, N, T/P, H] -> [B, N/P, T, H]`; `length` is T."""
    plan = HeadPlan(query.shape[1], query.shape[1], axis.size)
    return _exchange((query,), [plan.heads(rank) for rank in range(axis.size)], length, axis)[0]


def exchange_keys(key: Tensor, value: Tensor, num_heads: int, length: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Trade the shards of S keys and values for those of the heads that the rank's queries need, in one all-to-all."""
    plan = HeadPlan(num_heads, key.shape[1], axis.size)
    own = _exchange((key, value), [plan.kv_heads(rank) for rank in range(axis.size)], length, axis)
    return _grouped(own[0], plan, axis), _grouped(own[1], plan, axis)


def take_own_keys(key: Tensor, value: Tensor, num_heads: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The key and value heads that this rank's queries need, of tokens that are whole on every rank."""
    plan = HeadPlan(num_heads, key.shape[1], axis.size)
    heads = plan.kv_heads(axis.rank)
    own = [x.narrow(1, heads.start, len(heads)) for x in (key, value)]
    return _grouped(own[0], plan, axis), _grouped(own[1], plan, axis)


def _exchange(tokens: Sequence[Tensor], heads: list[range], length: int, axis: Axis) -> list[Tensor]:
    """Packed flat, [S/P, B, F] for one rank after the other, with its `heads`: what arrives is [S, B, F] in order."""
    batch_size = tokens[0].shape[0]
    packets = [_packet(tokens, own) for own in heads]
    parts = [(len(heads[axis.rank]), x.shape[3]) for x in tokens]
    num_features = sum(count * head_size for count, head_size in parts)
    received = all_to_all_runs(
        torch.cat([packet.flatten() for packet in packets]),
        [packet.numel() for packet in packets],
        [run * batch_size * num_features for run in run_lengths(length, axis.size)],
        axis.group_name,
    )
    pieces = received.view(length, batch_size, num_features).split([count * size for count, size in parts], dim=-1)
    return [split_dim(piece, 2, part).permute(1, 2, 0, 3) for piece, part in zip(pieces, parts, strict=True)]


def _packet(tokens: Sequence[Tensor], heads: range) -> Tensor:
    cut = [x.narrow(1, heads.start, len(heads)) for x in tokens]
    return torch.cat([x.permute(2, 0, 1, 3).flatten(2) for x in cut], dim=-1)


def _grouped(x: Tensor, plan: HeadPlan, axis: Axis) -> Tensor:
    """`x` such that equal groups of query heads share its heads, one after the other."""
    index = plan.kv_index(axis.rank)
    return x if index is None else torch.stack([x.select(1, head) for head in index], dim=1)
