"""Symbolic sizes as arithmetic: nodes that compute one when the graph runs, a function that checks some before."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.printers import PythonPrinter

from surgery.errors import CaptureError

Size = fx.Node | int


def size_node(graph: fx.Graph, expr: sympy.Expr, sizes: dict[sympy.Symbol, fx.Node]) -> Size:
    """Compute `expr` at the graph's insertion point from the symbols' nodes in `sizes`."""
    if expr.is_Integer:
        return int(expr)
    if isinstance(expr, sympy.Symbol) and expr in sizes:
        return sizes[expr]
    dividend, divisor = _quotient(expr)
    if divisor != 1:
        return _call(graph, operator.floordiv, size_node(graph, dividend, sizes), divisor)
    function = ARITHMETIC.get(type(expr))
    if function is None:
        raise CaptureError(f"a size of {expr} depends on data. Expected sizes that follow from those of the inputs.")
    terms = [size_node(graph, term, sizes) for term in expr.args]
    return reduce(lambda a, b: _call(graph, function, a, b), terms)


def predicate(symbols: Sequence[sympy.Symbol], conditions: Iterable[sympy.Basic]) -> Callable[..., bool]:
    """`holds(*sizes)`, for a size of each symbol: plain arithmetic, which Dynamo can follow too.

    That `s` is 4*k + 1 stands before what is asked of `(s - 1)/4`: quotients are taken to be whole. Raises
    `CaptureError` where there is no such arithmetic.
    """
    try:
        terms = [f"({_WholeQuotients().doprint(condition)})" for condition in conditions]
        source = f"lambda {', '.join(map(str, symbols))}: {' and '.join(['True', *terms])}"
        return eval(source, {"math": math, "torch": torch})
    except (NotImplementedError, SyntaxError, TypeError) as error:
        raise CaptureError(
            f"the graph is for some sizes only, and which cannot be told: {error}. "
            "Expected conditions in whole numbers. Take the branch on the length or the batch size out of the model."
        ) from error


class _WholeQuotients(PythonPrinter):
    """Python for an expression of sizes, where torch would print a float for `(s - 1)/4`."""

    def _print_Add(self, expr: sympy.Expr, order: str | None = None) -> str:  # noqa: N802
        return self._as_quotient(expr) or str(super()._print_Add(expr, order))

    def _print_Mul(self, expr: sympy.Expr) -> str:  # noqa: N802
        return self._as_quotient(expr) or str(super()._print_Mul(expr))

    def _print_Function(self, expr: sympy.Expr) -> str:  # noqa: N802
        raise NotImplementedError(f"{expr} has no arithmetic")

    def _as_quotient(self, expr: sympy.Expr) -> str | None:
        dividend, divisor = _quotient(expr)
        return f"(({self.doprint(dividend)}) // {divisor})" if divisor != 1 else None


def _quotient(expr: sympy.Expr) -> tuple[sympy.Expr, int]:
    """A whole number as one division: `(s - 1)/4`, where s is 4*k + 1, is s - 1 and 4."""
    dividend, divisor = sympy.fraction(sympy.together(expr))
    return (sympy.expand(dividend), int(divisor)) if divisor != 1 else (expr, 1)


def times(graph: fx.Graph, size: fx.Node, factor: Size) -> fx.Node:
    """The product of a size and a factor."""
    return _call(graph, operator.mul, factor, size)


def _call(graph: fx.Graph, function: Any, a: Size, b: Size) -> fx.Node:
    node = graph.call_function(function, (a, b))
    values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b)]
    node.meta["val"] = function(*values)
    return node


ARITHMETIC: dict[type, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
    Min: torch.sym_min,
    Max: torch.sym_max,
}
