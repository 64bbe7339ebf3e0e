"""Read every size from the inputs, once: sizes then always mean the whole batch, whatever a rank holds.

    s1 = sym_size(hidden, 1);  s2 = sym_size(labels, 1)    ->   sequence_length = sym_size(input_ids, 1)
    n  = sym_size(flat, 0)                                 ->   mul(batch_size, sequence_length)

After this pass a size in the graph is global by definition. Only arguments that *allocate* (view, expand, zeros) are
made local later, by insert-conversions; a size used as a number (the divisor of a mean) stays what the model meant.
A size that counts something in the data (the result of nonzero) is no sequence's, and stays as it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import fx

from surgery.metadata import Context
from surgery.pipeline import PassResult
from surgery.shapes import is_counted, to_expr
from surgery.sizes import size_node

SYM_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class CanonicalizeSizes:
    name: ClassVar[str] = "canonicalize-sizes"
    requires: ClassVar[frozenset[str]] = frozenset({"flat"})
    provides: ClassVar[frozenset[str]] = frozenset({"global-sizes"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        found = [node for node in find_sizes(graph) if not is_counted(to_expr(node.meta["val"]))]
        context.sizes.update(_read_from_inputs(graph, context))
        for node in found:
            with graph.inserting_before(node):
                node.replace_all_uses_with(size_node(graph, to_expr(node.meta["val"]), context.sizes))  # type: ignore[arg-type]
            graph.erase_node(node)
        return PassResult(len(found))


def find_sizes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that read a size from a tensor."""
    return list(graph.find_nodes(op="call_function", target=SYM_SIZE))


def _read_from_inputs(graph: fx.Graph, context: Context) -> dict[sympy.Symbol, fx.Node]:
    placeholders = graph.find_nodes(op="placeholder")
    sizes: dict[sympy.Symbol, fx.Node] = {}
    with graph.inserting_after(placeholders[-1]):
        for node in placeholders:
            for dim, size in enumerate(getattr(node.meta["val"], "shape", ())):
                symbol = to_expr(size)
                if isinstance(symbol, sympy.Symbol) and symbol not in sizes:
                    sizes[symbol] = graph.call_function(SYM_SIZE, (node, dim))
                    sizes[symbol].meta["val"] = size
    _name(graph, sizes, context)
    return sizes


def _name(graph: fx.Graph, sizes: dict[sympy.Symbol, fx.Node], context: Context) -> None:
    for symbol, name in ((context.batch, "batch_size"), (context.length, "sequence_length")):
        if symbol in sizes:
            sizes[symbol]._rename(name)
