"""Drop what does nothing: metadata assertions, casts to the same dtype, slices of everything, dropout that is off.

    x = to(x, float32)          where x is float32       ->  x
    x = slice(x, 1, 0, S)       the whole dimension      ->  x
    _assert_tensor_metadata(x)                           ->  -

Besides saving launches this keeps full slices of the sequence from looking like slices *through* the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from surgery.metadata import Context
from surgery.pipeline import PassResult
from surgery.randomness import RANDOM, draws
from surgery.rules.call import bind_arguments
from surgery.rules.table import operation_name
from surgery.shapes import shape_of

DROPOUTS = ("aten::dropout", "aten::alpha_dropout", "aten::feature_dropout", "aten::feature_alpha_dropout")


@dataclass(frozen=True)
class RemoveNoOps:
    name: ClassVar[str] = "remove-no-ops"
    requires: ClassVar[frozenset[str]] = frozenset({"flat"})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        found = find_no_ops(graph)
        for node in found:
            if node.users:
                node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        return PassResult(len(found))


def find_no_ops(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose result is their first operand, or that have no result."""
    return [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload) and _is_no_op(node)]


def _is_no_op(node: fx.Node) -> bool:
    check = NO_OPS.get(operation_name(node.target))
    return check is not None and check(node)


def _keeps_shape(node: fx.Node) -> bool:
    return shape_of(node.meta["val"]) == shape_of(node.all_input_nodes[0].meta["val"])


def keeps_type(node: fx.Node) -> bool:
    """Whether a cast is to the dtype and the device that its operand has, and no copy is asked for."""
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    is_copy = bind_arguments(node).get("copy", False)
    return not is_copy and before.dtype == after.dtype and before.device == after.device


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether it is a dropout of any kind that is off: its result is its operand, which a trace does not tell."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or operation_name(target) not in DROPOUTS:
        return False
    return RANDOM in target.tags and not draws(target, node.args, node.kwargs)


NO_OPS: dict[str, Callable[[fx.Node], bool]] = {
    "aten::_assert_tensor_metadata": lambda node: not node.users,
    "aten::alias": lambda node: True,
    "aten::dropout": is_idle_dropout,
    "aten::expand": _keeps_shape,
    "aten::slice": lambda node: _keeps_shape(node) and bind_arguments(node)["step"] == 1,
    "aten::to": keeps_type,
}
