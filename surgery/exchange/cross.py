"""The exchange around cross-attention, whose queries are T tokens and whose keys and values are S others.

    q    [B, N,  T/P, H] --exchange_queries-->  [B, N/P, T, H]      one all-to-all
    k, v [B, Nk, S/P, H] --exchange_keys-->     [B, Nk/P, S, H]     another, packed
    k, v [B, Nk, S, H]   --take_own_keys-->     [B, Nk/P, S, H]     none, where they are whole on every rank

The output travels back as that of any attention call: `surgery/exchange/heads.py`.
"""

from __future__ import annotations

from torch import Tensor

from surgery.axis import Axis
from surgery.exchange.head_plan import HeadPlan
from surgery.exchange.heads import exchange_flat, grouped


def exchange_queries(query: Tensor, length: int, axis: Axis) -> Tensor:
    """Trade the queries' sequence shards for head shards: `[B, N, T/P, H] -> [B, N/P, T, H]`; `length` is T."""
    plan = HeadPlan(query.shape[1], query.shape[1], axis.size)
    return exchange_flat((query,), [(plan.heads(rank),) for rank in range(axis.size)], length, axis)[0]


def exchange_keys(key: Tensor, value: Tensor, num_heads: int, length: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Trade the shards of S keys and values for those of the heads that the rank's queries need, in one all-to-all."""
    plan = HeadPlan(num_heads, key.shape[1], axis.size)
    own = exchange_flat((key, value), [(plan.kv_heads(rank),) * 2 for rank in range(axis.size)], length, axis)
    return grouped(own[0], plan, axis), grouped(own[1], plan, axis)


def take_own_keys(key: Tensor, value: Tensor, num_heads: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The key and value heads that this rank's queries need, of tokens that are whole on every rank."""
    plan = HeadPlan(num_heads, key.shape[1], axis.size)
    heads = plan.kv_heads(axis.rank)
    own = [x.narrow(1, heads.start, len(heads)) for x in (key, value)]
    return grouped(own[0], plan, axis), grouped(own[1], plan, axis)
