"""What attention is given on a rank that shares a head's queries with others: rows of what has one for each query.

    q [B, 1, rows, H] x k, v [B, 1, S, H], mask [B, 1 or N, rows, S]   ->   [B, 1, rows, H]

    own_rows       mask [B, 1 or N, T, S]    ->   [B, 1 or N, rows, S]
    causal_rows    is_causal, no mask        ->   [1, 1, rows, S]     query i of the rows sees the keys up to first + i

`surgery/exchange/row_plan.py` says which rows a rank has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.axis import Axis
from surgery.exchange.own_heads import cut_run
from surgery.exchange.row_plan import RowPlan


def own_rows(x: Tensor, dim: int, num_heads: int, length: int, axis: Axis) -> Tensor:
    """An operand with an entry for each of T queries in `dim` cut to this rank's; one that all share as it is."""
    first, end = RowPlan(num_heads, num_heads, axis.size).rows(axis.rank, length)
    return cut_run(x, dim, first, end - first)


def causal_rows(key: Tensor, num_heads: int, length: int, axis: Axis) -> Tensor | None:
    """Which keys [B, 1, S, H] this rank's rows see; None where it has all rows, for which `is_causal` says it.

    A kernel's own `is_causal` would count the rows from the first key.
    """
    plan = RowPlan(num_heads, num_heads, axis.size)
    if len(plan.row_ranks(axis.rank)) == axis.size:
        return None
    first, end = plan.rows(axis.rank, length)
    return torch.ones(1, 1, end - first, key.shape[2], dtype=torch.bool, device=key.device).tril(first)
