"""Take out of the graph what the capture assumed of its sizes, as conditions a later call is checked against.

    _assert_scalar(s != 2)        ->   an assumption of the program: another length captures again
    _assert_scalar(s == s)        ->   -

A trace follows one side of every branch. Where a model branches on the length or the batch size, export asserts the
side it took; a call on the other side then needs a graph of its own instead of an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import fx

from surgery.metadata import Context
from surgery.pipeline import PassResult
from surgery.shapes import expr_of

ASSERT = torch.ops.aten._assert_scalar.default


@dataclass(frozen=True)
class ExtractAssumptions:
    name: ClassVar[str] = "extract-assumptions"
    requires: ClassVar[frozenset[str]] = frozenset({"flat"})
    provides: ClassVar[frozenset[str]] = frozenset({"assumptions"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        found = find_assumptions(graph, context)
        for node, condition in found.items():
            if condition is not sympy.true:
                context.assumptions.append(condition)
            graph.erase_node(node)
        graph.eliminate_dead_code()
        return PassResult(len(found))


def find_assumptions(graph: fx.Graph, context: Context) -> dict[fx.Node, sympy.Basic]:
    """The assertions that speak of nothing but batch size and sequence lengths, with what they say."""
    known = {*context.lengths, context.batch}
    found = {}
    for node in graph.find_nodes(op="call_function", target=ASSERT):
        condition = _condition(node.args[0])
        if condition is not None and condition.free_symbols <= known:
            found[node] = condition
    return found


def _condition(argument: object) -> sympy.Basic | None:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    return expr_of(value) if isinstance(value, torch.SymBool) else None
