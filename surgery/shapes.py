"""Symbolic sizes: one captured graph serves every batch size `b` and all sequence lengths, `s` and a decoder's `t`.

Where a graph serves every fourth length, torch calls the length `4*k`. Here it is `s` all the same, and `k` is `s/4`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch.utils._sympy.symbol import SymT, symbol_is_type

from surgery.placement import ONE, Sharded

Shape = tuple[sympy.Expr, ...]
Lengths = tuple[sympy.Symbol, ...]


_lengths_by_root: WeakKeyDictionary[Any, dict[sympy.Symbol, sympy.Expr]] = WeakKeyDictionary()
"""For each trace (its `ShapeEnv`), what the symbols are that it has in the place of lengths: `{k: s/4}`."""


def to_expr(size: int | torch.SymInt) -> sympy.Expr:
    """The sympy expression of a size; a plain integer becomes `sympy.Integer`."""
    return expr_of(size) if isinstance(size, torch.SymInt) else sympy.Integer(size)


def expr_of(value: torch.SymInt | torch.SymBool) -> Any:
    """The sympy expression of a traced size, or of a truth about sizes."""
    names = _lengths_by_root.get(value.node.shape_env)
    return value.node.expr.subs(names) if names else value.node.expr


def name_length(size: torch.SymInt) -> None:
    """Let a length that a trace calls `4*k + 1` be a symbol: sizes of the same trace are told by it from now on.

    One that is told by another length already, as where the model ties the two, stays as it is.
    """
    expr = size.node.expr
    names = _lengths_by_root.setdefault(size.node.shape_env, {})
    if isinstance(expr, sympy.Symbol) or len(expr.free_symbols) != 1 or expr.free_symbols <= names.keys():
        return
    (root,) = expr.free_symbols
    length = sympy.Symbol(f"{root}_length", integer=True, positive=True)
    names[root] = sympy.solve(expr - length, root)[0]


def residue_of(size: torch.SymInt) -> tuple[int, int]:
    """The divisor and the remainder of a length: `(4, 1)` where its trace calls it `4*k + 1`, `(1, 0)` for a symbol."""
    expr = size.node.expr
    (root,) = expr.free_symbols
    divisor = int(expr.coeff(root))
    return divisor, int(expr.subs(root, 0)) % divisor


def shape_of(value: torch.Tensor) -> Shape:
    """The symbolic shape of a (fake) tensor."""
    return tuple(to_expr(size) for size in value.shape)


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether a (fake) tensor lies row by row, whatever its symbolic sizes are."""
    shape = shape_of(value)
    return all(
        size == ONE or sympy.expand(to_expr(stride) - product(shape[dim + 1 :])) == 0
        for dim, (size, stride) in enumerate(zip(shape, value.stride(), strict=True))
    )


def counts_in(size: sympy.Expr) -> set[sympy.Symbol]:
    """The symbols in a size that are read from data, as the number of nonzero entries is."""
    return {symbol for symbol in size.free_symbols if symbol_is_type(symbol, SymT.UNBACKED_INT)}


def is_counted(size: sympy.Expr) -> bool:
    """Whether a size follows from nothing but data: it is no sequence's."""
    return bool(size.free_symbols) and counts_in(size) == size.free_symbols


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    return sympy.Mul(*sizes)


def quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """`size / divisor` where that is a product of whole sizes, else None."""
    result = sympy.cancel(size / divisor) if size != divisor else ONE
    return result if sympy.fraction(result)[1] == 1 else None


def length_dims(shape: Shape, lengths: Lengths) -> tuple[int, ...]:
    """The dimensions of `shape` that depend on a sequence length, as a factor or in any other way."""
    return tuple(dim for dim, size in enumerate(shape) if not size.free_symbols.isdisjoint(lengths))


def only_length_dim(shape: Shape, lengths: Lengths) -> int | None:
    """The one dimension of `shape` that is exactly a sequence length, or None if there is none or several."""
    dims = length_dims(shape, lengths)
    return dims[0] if len(dims) == 1 and shape[dims[0]] in lengths else None


def length_of(shape: Shape, placement: Sharded) -> sympy.Expr:
    """The length of the sequence that is sharded: what `outer` and `inner` leave of the dimension.

    Which of a model's sequences a value is sharded over is thus said by its shape.
    """
    length = quotient(shape[placement.dim], placement.outer * placement.inner)
    assert length is not None
    return length


def place_in(shape: Shape, before: sympy.Expr, after: sympy.Expr, length: sympy.Expr) -> Sharded | None:
    """The placement in `shape` of a sequence with `before` elements ahead of it and `after` behind, in row-major order.

        [b, s, h]  is  before = b, after = h;   in [b*s, h] that is Sharded(0, outer=b);   in [b, s//4, 4, h] nowhere.

    None where no single dimension holds the whole sequence.
    """
    for dim in length_dims(shape, tuple(length.free_symbols)):
        outer = quotient(before, product(shape[:dim]))
        inner = quotient(after, product(shape[dim + 1 :]))
        if outer is not None and inner is not None and sympy.expand(outer * length * inner - shape[dim]) == 0:
            return Sharded(dim, outer, inner)
    return None


def elements_around(shape: Shape, placement: Sharded) -> tuple[sympy.Expr, sympy.Expr]:
    """How many elements lie ahead of and behind the sequence in row-major order: the inverse of `place_in`."""
    before = product(shape[: placement.dim]) * placement.outer
    after = placement.inner * product(shape[placement.dim + 1 :])
    return before, after
