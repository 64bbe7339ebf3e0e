"""Call the modules that no trace could follow, live and whole.

y = surgery::opaque([x], call 0)    ->   y = MambaMixer(self.model.layers[0].mixer, x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from surgery.capture.opaque import OPAQUE, make_runner
from surgery.metadata import Context
from surgery.pipeline import PassResult
from surgery.rules.call import bind_arguments


@dataclass(frozen=True)
class CallOpaqueModules:
    name: ClassVar[str] = "call-opaque-modules"
    requires: ClassVar[frozenset[str]] = frozenset({"lowered"})
    provides: ClassVar[frozenset[str]] = frozenset({"called"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        found = find_opaque_calls(graph)
        for node in found:
            call_module(graph, node, context)
        return PassResult(len(found), context.attempts)


def find_opaque_calls(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that stand for a call of a module."""
    return list(graph.find_nodes(op="call_function", target=OPAQUE))


def call_module(graph: fx.Graph, node: fx.Node, context: Context) -> None:
    """Make `node` the call: the module is looked up on the live model, its operands and numbers follow."""
    given = bind_arguments(node)
    call = context.opaque_calls[given["call"]]
    with graph.inserting_before(node):
        module = graph.get_attr(call.path)
    node.target = make_runner(call)
    node.args = (module, *call.arguments.arrange(given["operands"], given["numbers"]))
    node.kwargs = {"sizes": given["sizes"]}
    node.meta["val"] = tuple(node.meta["val"])
