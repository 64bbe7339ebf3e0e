"""Where the sequence lives in a value: the three placements every tensor of the graph gets.

    Replicated      every rank holds the whole value
    Sharded(1)      rank r holds the r-th contiguous run of the sequence in dim 1
    Partial         every rank holds an addend; the value is their sum

After `view(-1, H)` the sequence is one factor of a larger dimension, `B*S`. Slicing that dimension into P runs would
cut batches apart, so `Sharded` says which factor the sequence is: `size(dim) == outer * S * inner`. An encoder-decoder
has two sequences; which of them a value is sharded over is what its shape has in that place (`shapes.length_of`).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "replicated"


@dataclass(frozen=True)
class Partial:
    """Every rank holds an addend of the value."""

    def __str__(self) -> str:
        return "partial sum"


@dataclass(frozen=True)
class Sharded:
    """Rank r holds the r-th contiguous run of the sequence, a factor of dimension `dim`.

    `outer` and `inner` are the products of the sizes that were flattened into `dim` before and after the sequence.
    """

    dim: int
    outer: sympy.Expr = ONE
    inner: sympy.Expr = ONE

    @property
    def is_whole_dim(self) -> bool:
        return self.outer == ONE and self.inner == ONE

    def moved_to(self, dim: int) -> Sharded:
        return Sharded(dim, self.outer, self.inner)

    def __str__(self) -> str:
        return f"sharded({self.dim})"


@dataclass(frozen=True)
class HeadSharded:
    """Rank r holds its own heads (dim 1) over the whole sequence: the inside of an exchange, and nowhere else."""

    dim: int = 1

    def __str__(self) -> str:
        return f"heads({self.dim})"


@dataclass(frozen=True)
class RowSharded:
    """Rank r holds some rows (dim 2) of its one head: what the ranks of a head share inside an exchange."""

    dim: int = 2
    head_dim: int = 1

    def __str__(self) -> str:
        return f"rows({self.dim})"


Placement = Replicated | Partial | Sharded | HeadSharded | RowSharded

REPLICATED = Replicated()
PARTIAL = Partial()
