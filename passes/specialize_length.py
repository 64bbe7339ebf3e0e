"""Turn the sequence length into a number, for models transformed for one length only.

view(x, [B, local_length(sequence_length), 8, 64])    ->   view(x, [B, 8192, 8, 64])
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from surgery.axis import local_length
from surgery.metadata import Context
from surgery.pipeline import PassResult

ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv, local_length)


@dataclass(frozen=True)
class SpecializeLength:
    name: ClassVar[str] = "specialize-length"
    requires: ClassVar[frozenset[str]] = frozenset({"seeded"})
    provides: ClassVar[frozenset[str]] = frozenset({"specialized"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        if context.fixed_length is None:
            return PassResult(0)
        replace_by_number(graph, context.sizes[context.length], context.fixed_length)
        folded = 1
        while constants := find_constants(graph):
            for node in constants:
                replace_by_number(graph, node, node.target(*node.args, **node.kwargs))  # type: ignore[operator]
            folded += len(constants)
        return PassResult(folded)


def find_constants(graph: fx.Graph) -> list[fx.Node]:
    """Arithmetic on numbers alone."""
    nodes = (node for node in graph.nodes if node.op == "call_function" and node.target in ARITHMETIC)
    return [node for node in nodes if all(isinstance(arg, int) for arg in node.args)]


def replace_by_number(graph: fx.Graph, node: fx.Node, number: int) -> None:
    """Put `number` wherever `node` is used, and drop `node`."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda arg: number if arg is node else arg)
        user.kwargs = fx.map_arg(user.kwargs, lambda arg: number if arg is node else arg)
    graph.erase_node(node)
