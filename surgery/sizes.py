"""Sizes as graph nodes: from a symbolic expression to the arithmetic that computes it when the graph runs."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from surgery.errors import CaptureError

Size = fx.Node | int


def size_node(graph: fx.Graph, expr: sympy.Expr, sizes: dict[sympy.Symbol, fx.Node]) -> Size:
    """Compute `expr` at the graph's insertion point from the symbols' nodes in `sizes`."""
    if expr.is_Integer:
        return int(expr)
    if isinstance(expr, sympy.Symbol) and expr in sizes:
        return sizes[expr]
    dividend, divisor = sympy.fraction(sympy.together(expr))
    if divisor != 1:  # (s - 1)/4, where s is 4*k + 1
        return _call(graph, operator.floordiv, size_node(graph, sympy.expand(dividend), sizes), int(divisor))
    function = ARITHMETIC.get(type(expr))
    if function is None:
        raise CaptureError(f"a size of {expr} depends on data. Expected sizes that follow from those of the inputs.")
    terms = [size_node(graph, term, sizes) for term in expr.args]
    return reduce(lambda a, b: _call(graph, function, a, b), terms)


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
