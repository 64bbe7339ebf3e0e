"""Which rank attends with which rows of which head, where there are more ranks than heads.

    N = 2, P = 5           rank 0    rank 1    rank 2    rank 3    rank 4
    query head             0         0         0         1         1
    rows: the tokens of    0         1 2       3 4       0 1       2 3 4      ranks, as they hold the sequence
    key and value head     the one that the query head needs, of all tokens

The ranks of one head share its queries, and each of those sees every key. A rank attends for whole runs of tokens, as
many of the P runs as its neighbours by one at most: so each query of a token travels to one rank, and whose it is does
not depend on the length. Each key and value head of a token goes once to every rank that attends with it. No exchange
for this plan could send less.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.axis import first_token
from surgery.exchange.head_plan import kv_heads_of


@dataclass(frozen=True)
class RowPlan:
    """The rows and heads of one attention call whose `num_heads` N are fewer than its `size` P ranks."""

    num_heads: int
    num_kv_heads: int
    size: int

    def heads(self, rank: int) -> range:
        """The one query head of `rank`."""
        head = first_token(self.num_heads, rank, self.size)
        return range(head, head + 1)

    def kv_heads(self, rank: int) -> range:
        """The key and value head that the query head of `rank` needs."""
        return kv_heads_of(self.heads(rank), self.num_heads, self.num_kv_heads)

    def sharers(self, head: int) -> range:
        """The ranks that attend with query head `head`."""
        return range(*(-(-h * self.size // self.num_heads) for h in (head, head + 1)))

    def row_ranks(self, rank: int) -> range:
        """The ranks for whose tokens `rank` attends."""
        ranks = self.sharers(self.heads(rank).start)
        place = rank - ranks.start
        return range(*(first_token(self.size, place + i, len(ranks)) for i in (0, 1)))

    def rows(self, rank: int, length: int) -> tuple[int, int]:
        """The first of the `length` tokens for which `rank` attends, and the one behind the last."""
        ranks = self.row_ranks(rank)
        return first_token(length, ranks.start, self.size), first_token(length, ranks.stop, self.size)

    def sent_queries(self, rank: int) -> int:
        """How many of the query heads of each token it holds `rank` sends to other ranks."""
        return self.num_heads - (rank in self.row_ranks(rank))

    def returned_features(self, rank: int, value_head_size: int) -> int:
        """How many numbers `rank` sends back to each rank it attends for, for each token, times those ranks."""
        ranks = self.row_ranks(rank)
        return (len(ranks) - (rank in ranks)) * value_head_size
