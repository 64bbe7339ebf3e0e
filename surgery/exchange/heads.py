"""The exchange around an attention call: sequence shards become head shards, and back.

    q [B, N,  S/P, H]  --exchange_to_heads-->     [B, N/P, S, H]      one all-to-all, queries, keys and values packed
    out [B, N/P, S, H] --exchange_to_sequence-->  [B, N, S/P, H]      another

Both are plain tensor code around one collective, so that a compiler can fuse the packing with what stands before it.
Where heads do not divide over the ranks (`head_plan.py`), what each rank is sent differs in size: the same two
all-to-alls then send flat runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.axis import Axis, local_length, run_lengths
from surgery.collectives import split_dim
from surgery.exchange.head_plan import HeadPlan
from surgery.private import all_to_all_runs

Tokens = tuple[Tensor, Tensor, Tensor]


def exchange_to_heads(query: Tensor, key: Tensor, value: Tensor, length: int, axis: Axis) -> Tokens:
    """Trade sequence shards for head shards, in one all-to-all.

        query       [B, N,  S/P, H] -> [B, N/P, S, H]
        key, value  [B, Nk, S/P, H] -> [B, max(Nk/P, 1), S, H]

    A key or value head travels once to each rank whose queries need it, and never twice to one. Query heads of the
    result share its key and value heads in equal groups, one after the other.
    """
    plan = HeadPlan(query.shape[1], key.shape[1], axis.size)
    exchange = _exchange_even_heads if plan.is_even else _exchange_uneven_heads
    return exchange((query, key, value), length, plan, axis)


def _exchange_even_heads(tokens: Tokens, length: int, plan: HeadPlan, axis: Axis) -> Tokens:
    """Packed as [P, S/P, B, F]: what arrives is [S, B, F] already in order, so that taking it apart is a view."""
    parts = [_by_destination(x, axis.size) for x in tokens]
    packed = torch.cat([part.flatten(3) for part in parts], dim=-1)
    sent = [packed.shape[1]] * axis.size
    received = all_to_all_runs(packed.flatten(0, 1), sent, run_lengths(length, axis.size), axis.group_name)
    query, key, value = _taken_apart(received, [(part.shape[3], part.shape[4]) for part in parts])
    return query, key, value


def _by_destination(x: Tensor, size: int) -> Tensor:
    """`[B, N, S/P, H] -> [P, S/P, B, heads per rank, H]`, the heads for rank p at index p."""
    num_heads = x.shape[1]
    if num_heads % size == 0:
        return split_dim(x, 1, (size, num_heads // size)).permute(1, 3, 0, 2, 4)
    copies = x.unsqueeze(2).expand(-1, -1, size // num_heads, -1, -1)
    return copies.flatten(1, 2).unsqueeze(2).permute(1, 3, 0, 2, 4)


def _taken_apart(received: Tensor, parts: list[tuple[int, int]]) -> list[Tensor]:
    """`[S, B, F]` as tensors `[B, heads, S, H]`; `parts` are their heads and head sizes."""
    pieces = received.split([heads * head_size for heads, head_size in parts], dim=-1)
    return [split_dim(piece, 2, part).permute(1, 2, 0, 3) for piece, part in zip(pieces, parts, strict=True)]


def _exchange_uneven_heads(tokens: Tokens, length: int, plan: HeadPlan, axis: Axis) -> Tokens:
    owned = [(plan.heads(rank), plan.kv_heads(rank), plan.kv_heads(rank)) for rank in range(axis.size)]
    query, key, value = exchange_flat(tokens, owned, length, axis)
    return query, grouped(key, plan, axis), grouped(value, plan, axis)


def exchange_flat(tokens: Sequence[Tensor], owned: Sequence[Sequence[range]], length: int, axis: Axis) -> list[Tensor]:
    """Send each rank the heads it owns, in one all-to-all: `[B, N, S/P, H] -> [B, own heads, S, H]` for each tensor.

    `owned[rank]` has a range of heads for each of `tokens`. Packed flat, [S/P, B, F] for one rank after the other, each
    F its own: what arrives is [S, B, F] in order.
    """
    batch_size = tokens[0].shape[0]
    packets = [_packet(tokens, heads) for heads in owned]
    parts = [(len(heads), x.shape[3]) for heads, x in zip(owned[axis.rank], tokens, strict=True)]
    num_features = sum(count * head_size for count, head_size in parts)
    counts = [run * batch_size * num_features for run in run_lengths(length, axis.size)]
    received = send([packet.flatten() for packet in packets], counts, axis)
    return _taken_apart(received.view(length, batch_size, num_features), parts)


def send(packets: Sequence[Tensor], received: Sequence[int], axis: Axis) -> Tensor:
    """One all-to-all of flat packets, one for each rank; `received` counts the numbers that each rank sends here."""
    counts = [packet.numel() for packet in packets]
    return all_to_all_runs(torch.cat(list(packets)), counts, received, axis.group_name)


def _packet(tokens: Sequence[Tensor], owned: Sequence[range]) -> Tensor:
    """What one rank is sent: `[S/P, B, F]`."""
    cut = [x.narrow(1, heads.start, len(heads)) for x, heads in zip(tokens, owned, strict=True)]
    return torch.cat([x.permute(2, 0, 1, 3).flatten(2) for x in cut], dim=-1)


def grouped(x: Tensor, plan: HeadPlan, axis: Axis) -> Tensor:
    """Key or value heads such that equal groups of this rank's query heads share them, one after the other."""
    index = plan.kv_index(axis.rank)
    return x if index is None else torch.stack([x.select(1, head) for head in index], dim=1)


def exchange_to_sequence(output: Tensor, num_heads: int, axis: Axis) -> Tensor:
    """Trade head shards back for sequence shards: `[B, N/P, S, H] -> [B, N, S/P, H]`; `num_heads` is N.

    The result is a transposed view of a contiguous [B, S/P, N, H], the layout the output projection reads.
    """
    batch_size, own_heads, length, head_size = output.shape
    packed = output.permute(2, 0, 1, 3).flatten(2).contiguous()
    runs, own = run_lengths(length, axis.size), local_length(length, axis)
    if num_heads % axis.size == 0:
        received = all_to_all_runs(packed, runs, [own] * axis.size, axis.group_name)
        split = split_dim(split_dim(received, 2, (own_heads, head_size)), 0, (axis.size, own))
        return split.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)
    plan = HeadPlan(num_heads, num_heads, axis.size)
    counts = [len(plan.heads(rank)) for rank in range(axis.size)]
    sent = [run * batch_size * own_heads * head_size for run in runs]
    sizes = [own * batch_size * heads * head_size for heads in counts]
    pieces = all_to_all_runs(packed.flatten(), sent, sizes, axis.group_name).split(sizes)
    by_rank = [piece.view(own, batch_size, heads, head_size) for piece, heads in zip(pieces, counts, strict=True)]
    return torch.cat([piece.transpose(0, 1) for piece in by_rank], dim=2).transpose(1, 2)
