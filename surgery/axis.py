"""One rank's place on the sequence-parallel axis, and which tokens of a sequence it holds.

    S = 10, P = 4      rank 0: t0 t1     rank 1: t2 t3 t4     rank 2: t5 t6     rank 3: t7 t8 t9

Rank r holds the tokens from r*S//P to (r+1)*S//P: any length, runs that differ by one token at most, and none at all on
some ranks where S < P. Where P divides S every run is S/P. Both formulas are floor divisions: they stay symbolic
while a program is compiled, and the lengths add up to S by cancellation. They are written here and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

from surgery.private import GroupName


class Axis(NamedTuple):
    """One rank's view of the sequence-parallel mesh axis."""

    size: int
    rank: int
    group_name: GroupName


def first_token(length: int, rank: int, size: int) -> int:
    """Where the run of rank `rank` of `size` begins; that of rank `size` is the end of the sequence."""
    return rank * length // size


def run_length(length: int, rank: int, size: int) -> int:
    """How many of a sequence's tokens rank `rank` of `size` holds."""
    return first_token(length, rank + 1, size) - first_token(length, rank, size)


def run_lengths(length: int, size: int) -> tuple[int, ...]:
    """How many tokens each rank holds, in the order of the ranks."""
    return tuple(run_length(length, rank, size) for rank in range(size))


def local_length(length: int, axis: Axis) -> int:
    """How many of a sequence's tokens this rank holds: what graphs call where a size is made local."""
    return run_length(length, axis.rank, axis.size)
