"""Which rank attends with which heads, for any counts, and what each must be sent for that.

    N = 6, Nk = 3, P = 4      rank 0    rank 1    rank 2    rank 3
    query heads               0         1 2       3         4 5        runs that differ by one at most
    key and value heads       0         0 1       1         2          those that the query heads need

Query heads are dealt out as tokens are: rank r has those from r*N//P to (r+1)*N//P. With more ranks than heads some
have none, and attend to nothing, unless they share the others' (`row_plan.py`). Each query head of a token travels to
the one rank that attends with it, each key and value head of a token to every rank that needs it, once and un-repeated:
no exchange could send less.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.axis import first_token


@dataclass(frozen=True)
class HeadPlan:
    """The heads of one attention call, `num_heads` N and `num_kv_heads` Nk, over `size` P ranks."""

    num_heads: int
    num_kv_heads: int
    size: int

    @property
    def is_even(self) -> bool:
        """Whether all ranks have equally many heads of each kind, of which no two overlap by parts."""
        has_even_keys = self.num_kv_heads % self.size == 0 or self.size % self.num_kv_heads == 0
        return self.num_heads % self.size == 0 and has_even_keys

    def heads(self, rank: int) -> range:
        """The query heads of `rank`."""
        return range(*(first_token(self.num_heads, r, self.size) for r in (rank, rank + 1)))

    def kv_heads(self, rank: int) -> range:
        """The key and value heads that the query heads of `rank` need."""
        return kv_heads_of(self.heads(rank), self.num_heads, self.num_kv_heads)

    def kv_index(self, rank: int) -> tuple[int, ...] | None:
        """For each query head of `rank` its place among `kv_heads`, or None where equal groups follow one another."""
        own, needed = self.heads(rank), self.kv_heads(rank)
        index = tuple(kv_head_of(head, self.num_heads, self.num_kv_heads) - needed.start for head in own)
        group = len(own) // len(needed) if needed else 0
        return None if index == tuple(i // group for i in range(group * len(needed))) else index

    def num_features(self, rank: int, head_size: int, value_head_size: int) -> int:
        """How many numbers of each token `rank` is sent: its query heads, its key heads, its value heads."""
        return len(self.heads(rank)) * head_size + len(self.kv_heads(rank)) * (head_size + value_head_size)

    def sent_features(self, rank: int, head_size: int, value_head_size: int) -> int:
        """How many numbers `rank` sends to other ranks for each token it holds, on the way to attention."""
        others = (other for other in range(self.size) if other != rank)
        return sum(self.num_features(other, head_size, value_head_size) for other in others)

    def returned_features(self, rank: int, value_head_size: int) -> int:
        """How many numbers `rank` sends back to each other rank for each token, times the other ranks."""
        return (self.size - 1) * len(self.heads(rank)) * value_head_size

    def most_bytes_per_token(self, head_size: int, value_head_size: int, element_size_bytes: int) -> tuple[int, int]:
        """The bytes that the busiest rank sends for each token it holds: to attention, and back from it."""
        ranks = range(self.size)
        sent = max(self.sent_features(rank, head_size, value_head_size) for rank in ranks)
        returned = max(self.returned_features(rank, value_head_size) for rank in ranks)
        return sent * element_size_bytes, returned * element_size_bytes


def kv_head_of(head: int, num_heads: int, num_kv_heads: int) -> int:
    """The key and value head, of `num_kv_heads`, that one of the `num_heads` query heads needs."""
    return head * num_kv_heads // num_heads


def kv_heads_of(heads: range, num_heads: int, num_kv_heads: int) -> range:
    """The key and value heads that a run of query heads needs."""
    first, last = (kv_head_of(head, num_heads, num_kv_heads) for head in (heads.start, heads.stop - 1))
    return range(first, last + 1) if heads else range(0)
