"""Unfold the sub-graphs that export wraps around `no_grad` and `autocast` blocks, so that one flat graph is left.

    wrap_with_set_grad_enabled(False, submod, x)   ->   y = mul(x, 2);  y' = detach(y)
    wrap_with_autocast("cpu", None, False, ...)    ->   y = mul(x, 2)

Under `no_grad` values flow on without a gradient, which `detach` keeps. An autocast block that switches autocast *on*
has no equivalent in a flat graph and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.remove_no_ops import keeps_type
from surgery.errors import CaptureError
from surgery.metadata import Context, where
from surgery.pipeline import PassResult
from surgery.shapes import to_expr

SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast
BLOCKS: dict[Any, int] = {SET_GRAD: 1, AUTOCAST: 4}
"""At which of its arguments a block's sub-graph stands; its operands follow."""
aten = torch.ops.aten
CASTS = (aten.contiguous, aten.to, aten.type_as)


@dataclass(frozen=True)
class InlineBlocks:
    name: ClassVar[str] = "inline-blocks"
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset({"flat"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        changed = inline_all(graph)
        graph.owning_module = None  # a flat graph reads its attributes from the live model
        return PassResult(changed)


def inline_all(graph: fx.Graph) -> int:
    """Unfold all blocks, and those in them; how many there were."""
    changed = 0
    while blocks := find_blocks(graph):
        for node in blocks:
            inline(graph, node)
        changed += len(blocks)
    return changed


def find_blocks(graph: fx.Graph) -> list[fx.Node]:
    """The calls of wrapped sub-graphs."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in BLOCKS]


def is_gradless(node: fx.Node) -> bool:
    """Whether a node is a block under `no_grad`."""
    return node.target is SET_GRAD and not node.args[0]


def open_block(root: torch.nn.Module, node: fx.Node) -> tuple[fx.GraphModule, list[Any]]:
    """The sub-graph of `root` that a block wraps, and the operands that it is called with."""
    submodule, *operands = node.args[BLOCKS[node.target] :]
    assert isinstance(submodule, fx.Node)
    wrapped = root.get_submodule(str(submodule.target))
    assert isinstance(wrapped, fx.GraphModule)
    return wrapped, operands


def inline(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a wrapped sub-graph by its nodes."""
    if node.target is AUTOCAST and node.args[2]:
        raise CaptureError(
            f"{where(node)}: the model switches autocast on inside its forward, which one flat graph cannot keep. "
            "Cast the model instead (model.to(torch.bfloat16)), or remove the autocast block."
        )
    assert graph.owning_module is not None
    wrapped, operands = open_block(graph.owning_module, node)
    submodule = node.args[BLOCKS[node.target]]
    with graph.inserting_before(node):
        results = _copy(graph, wrapped.graph, operands)
        if is_gradless(node):
            results = [_detached(graph, result, operands) for result in results]
    _rewire(graph, node, results)
    if isinstance(submodule, fx.Node) and not submodule.users:
        graph.erase_node(submodule)


def _copy(graph: fx.Graph, body: fx.Graph, operands: list[Any]) -> list[Any]:
    values: dict[fx.Node, Any] = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
    for inner in body.nodes:
        if inner.op == "output":
            outputs = inner.args[0]
            return [values[out] if isinstance(out, fx.Node) else out for out in outputs]
        if inner.op == "get_attr":
            values[inner] = _hoisted(graph, body, inner)
        elif inner.op != "placeholder":
            values[inner] = graph.node_copy(inner, lambda source: values[source])
    raise AssertionError("a graph without output")


def _hoisted(graph: fx.Graph, body: fx.Graph, inner: fx.Node) -> fx.Node:
    """Bring a nested sub-graph up one level, under a name that is still free there."""
    root, owner = graph.owning_module, body.owning_module
    assert isinstance(root, torch.nn.Module) and isinstance(owner, torch.nn.Module)
    name = f"inlined_{len(list(root.children()))}"
    root.add_module(name, owner.get_submodule(str(inner.target)))
    node = graph.create_node("get_attr", name)
    node.meta = dict(inner.meta)
    return node


def _detached(graph: fx.Graph, result: Any, operands: list[Any]) -> Any:
    """A result without a gradient, unless it is an operand itself: `x.float()` of a float32 is x, with its gradient."""
    same = result
    while isinstance(same, fx.Node) and same not in operands and is_itself(same):
        same = same.args[0]
    if same in operands:
        return same
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return result
    node = graph.call_function(torch.ops.aten.detach.default, (result,))
    node.meta = dict(result.meta)
    return node


def is_itself(node: fx.Node) -> bool:
    """Whether an operation gives its very operand back: a cast to the same dtype, what is contiguous made so."""
    if getattr(node.target, "overloadpacket", None) not in CASTS or not keeps_type(node):
        return False
    values = (node.all_input_nodes[0].meta["val"], node.meta["val"])
    strides = [[to_expr(stride) for stride in value.stride()] for value in values]
    return strides[0] == strides[1]


def _rewire(graph: fx.Graph, node: fx.Node, results: list[Any]) -> None:
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with(results[index])
        graph.erase_node(user)
    graph.erase_node(node)
