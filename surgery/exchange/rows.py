"""The exchange where ranks share the rows of a head: `surgery/exchange/row_plan.py` says which rank has which.

    q    [B, N,  T/P, H] ─┐  exchange_to_rows      ┌─ [B, 1, rows, H]      this rank's rows of its one head
    k, v [B, Nk, S/P, H] ─┘  one all-to-all        └─ [B, 1, S, H]         all the keys that they may see

    out  [B, 1, rows, H]  ── exchange_from_rows ──>   [B, N, T/P, H]       another

T is S except in cross-attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.axis import Axis, local_length, run_lengths
from surgery.exchange.heads import Tokens, send
from surgery.exchange.row_plan import RowPlan


def exchange_to_rows(query: Tensor, key: Tensor, value: Tensor, length: int, key_length: int, axis: Axis) -> Tokens:
    """Trade sequence shards for rows of one head, in one all-to-all; `length` is T, `key_length` S.

    A packet is flat: the queries [T/P, B, H] where the rank it is for attends for them, then the keys and values
    [S/P, B, 2 * H].
    """
    plan = RowPlan(query.shape[1], key.shape[1], axis.size)
    batch_size, sizes = query.shape[0], [key.shape[3], value.shape[3]]
    packets = [_packet(query, key, value, rank, plan, axis) for rank in range(axis.size)]
    rows, keys = _rows_by_rank(length, plan, axis), run_lengths(key_length, axis.size)
    counts = [(row * batch_size * sizes[0], run * batch_size * sum(sizes)) for row, run in zip(rows, keys, strict=True)]
    pieces = send(packets, [sum(pair) for pair in counts], axis).split([count for pair in counts for count in pair])
    own_query = torch.cat(pieces[::2]).view(sum(rows), batch_size, 1, sizes[0]).permute(1, 2, 0, 3)
    own_kv = torch.cat(pieces[1::2]).view(key_length, batch_size, 1, sum(sizes)).permute(1, 2, 0, 3)
    own_key, own_value = own_kv.split(sizes, dim=-1)
    return own_query, own_key, own_value


def _packet(query: Tensor, key: Tensor, value: Tensor, rank: int, plan: RowPlan, axis: Axis) -> Tensor:
    """What `rank` is sent, flat."""
    key, value = (_of_head(x, plan.kv_heads(rank).start) for x in (key, value))
    kv = torch.cat([key, value], dim=-1).flatten()
    is_served = axis.rank in plan.row_ranks(rank)
    return torch.cat([_of_head(query, plan.heads(rank).start).flatten(), kv]) if is_served else kv


def _of_head(x: Tensor, head: int) -> Tensor:
    """`[B, N, S/P, H] -> [S/P, B, H]`."""
    return x.select(1, head).transpose(0, 1)


def exchange_from_rows(output: Tensor, num_heads: int, length: int, axis: Axis) -> Tensor:
    """Send the rows home: `[B, 1, rows, H] -> [B, N, T/P, H]`; `num_heads` is N, `length` T.

    Of each head one rank attends for these tokens, and ranks are in the order of their heads: what arrives is
    [N, T/P, B, H] in order. The result is a transposed view, the layout the output projection reads.
    """
    plan = RowPlan(num_heads, num_heads, axis.size)
    batch_size, head_size, own = output.shape[0], output.shape[3], local_length(length, axis)
    packets = [piece.flatten() for piece in output.permute(2, 0, 1, 3).split(_rows_by_rank(length, plan, axis))]
    count = own * batch_size * head_size
    received = [count if axis.rank in plan.row_ranks(rank) else 0 for rank in range(axis.size)]
    arrived = send(packets, received, axis).view(num_heads, own, batch_size, head_size)
    return arrived.permute(2, 1, 0, 3).contiguous().transpose(1, 2)


def _rows_by_rank(length: int, plan: RowPlan, axis: Axis) -> list[int]:
    """For how many tokens of each rank this rank attends: all or none."""
    ranks = plan.row_ranks(axis.rank)
    return [run if rank in ranks else 0 for rank, run in enumerate(run_lengths(length, axis.size))]
