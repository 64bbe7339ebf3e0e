"""Sizes in a graph: the arithmetic that computes them gives what the expression says."""

from __future__ import annotations

import pytest
import sympy
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, OpaqueUnaryFn_log, PythonMod

from surgery.errors import CaptureError
from surgery.sizes import predicate, size_node

S, B = sympy.symbols("s b", integer=True, positive=True)


@pytest.mark.parametrize(
    "expr",
    [
        B * S + 3,
        FloorDiv(S, 4) * 4,
        S / 4 - sympy.Rational(1, 4),
        5 * S / 4 - sympy.Rational(5, 4),
        B * (S - 1) / 4,
        PythonMod(-S, 8),
        S - Mod(S, 8) + 8,
        Min(3, S / 4 - sympy.Rational(1, 4)),
        Max(40, S),
    ],
)
def test_size(expr: sympy.Expr) -> None:
    """Of 2 sequences of 33 tokens, in a graph for lengths of 4*k + 1."""
    graph = fx.Graph()
    sizes = {symbol: graph.placeholder(str(symbol)) for symbol in (S, B)}
    sizes[S].meta["val"], sizes[B].meta["val"] = 33, 2
    node = size_node(graph, expr, sizes)
    assert isinstance(node, fx.Node) and node.meta["val"] == expr.subs({S: 33, B: 2})


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (sympy.Eq(Mod(S, 4), 1), True),
        (S >= 34, False),
        (B * (S / 4 - sympy.Rational(1, 4)) >= 16, True),
        (sympy.Ne(FloorDiv(S / 3 - 1, 2), 5), False),
        (sympy.Or(S < 12, Max(B, S) > 32), True),
        (sympy.Not(sympy.And(S > 12, PythonMod(-S, 8) > 1)), False),
    ],
)
def test_predicate(condition: sympy.Basic, holds: bool) -> None:
    """Of the same sizes, and in whole numbers, as floats would round a third of the length."""
    assert predicate([B, S], [S >= 2, condition])(2, 33) is holds


def test_a_length_that_leaves_another_rest_is_not_served() -> None:
    """Whatever `//` makes of (s - 1)/4 there."""
    conditions = [sympy.Eq(Mod(S, 4), 1), S / 4 - sympy.Rational(1, 4) >= 8]
    assert [length for length in range(30, 42) if predicate([S], conditions)(length)] == [33, 37, 41]


@pytest.mark.parametrize("condition", [OpaqueUnaryFn_log(S) > 3, S / B > 3])
def test_no_predicate_of_other_numbers(condition: sympy.Basic) -> None:
    with pytest.raises(CaptureError, match="which cannot be told"):
        predicate([B, S], [condition])


def test_data_is_no_size() -> None:
    with pytest.raises(CaptureError, match="a size of u depends on data"):
        size_node(fx.Graph(), sympy.Symbol("u"), {})
