"""Ask for shapes, not for memory layouts: a slice of the sequence, or a gathered value, is laid out unlike the whole.

view(x, [b*s, h]), _unsafe_view(...)      ->   reshape(x, [b*s, h])      a view still, wherever one is possible
_reshape_alias(x, [b*s, h], [h, 1])       ->   reshape(x, [b*s, h])
squeeze(x), squeeze(x, 1)                 ->   squeeze(x, [dims of one in the whole])   a shard may be of one token
as_strided(x, ...)                        ->   refused: it would read other elements, without an error
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from surgery.errors import UnsupportedOperationError
from surgery.metadata import Context, where
from surgery.pipeline import PassResult
from surgery.placement import ONE
from surgery.rules.call import bind_arguments
from surgery.rules.table import is_call
from surgery.shapes import shape_of

aten = torch.ops.aten
RELAXED: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten._reshape_alias.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
OPERANDS = 2  # the value and its new shape; _reshape_alias also names strides
STRIDED = aten.as_strided.default


@dataclass(frozen=True)
class RelaxViews:
    name: ClassVar[str] = "relax-views"
    requires: ClassVar[frozenset[str]] = frozenset({"flat"})
    provides: ClassVar[frozenset[str]] = frozenset({"relaxed-views"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        refuse_strided(graph)
        found = find_views(graph)
        for node in found:
            node.target = RELAXED[node.target]
            node.args = node.args[:OPERANDS]
        return PassResult(len(found) + name_squeezed(graph))


def name_squeezed(graph: fx.Graph) -> int:
    """Let each squeeze say which dims it takes away: those that are one in the whole, not those of a rank's shard."""
    found = [node for node in graph.nodes if is_call(node, "aten::squeeze")]
    for node in found:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        shape = shape_of(source.meta["val"])
        asked = bind_arguments(node).get("dim", range(len(shape)))
        dims = {int(dim) % max(len(shape), 1) for dim in ([asked] if isinstance(asked, int) else asked)}
        node.target = aten.squeeze.dims
        node.args = (source, [dim for dim in sorted(dims) if dim < len(shape) and shape[dim] == ONE])
        node.kwargs = {}
    return len(found)


def find_views(graph: fx.Graph) -> list[fx.Node]:
    """The calls that want a reshape without a copy."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in RELAXED]


def refuse_strided(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=STRIDED):
        raise UnsupportedOperationError(
            f"relax-views: {where(node)} reads memory by strides, which a shard does not share with the whole. "
            "Expected views by shape. Use view, unfold or slices instead."
        )
