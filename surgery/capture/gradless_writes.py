"""Writes that autograd does not see: a trace makes of them operations that it does, and the gradient is another.

    with torch.no_grad():
        y.clamp_(-1, 1)         run: other values, the gradient of y      traced: y2 = detach(clamp(y)), no gradient
    y.detach().mul_(2)          the same

Refused, so that the module around them is called whole, where the model's own code does them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from passes.inline_blocks import AUTOCAST, SET_GRAD
from surgery.errors import CaptureError
from surgery.metadata import where

BLOCKS = {SET_GRAD: 1, AUTOCAST: 4}
"""At which of its arguments a block's sub-graph stands, and the operands behind it."""
LEARNING = (InputKind.PARAMETER, InputKind.USER_INPUT)


def refuse_gradless_writes(program: ExportedProgram) -> None:
    """Refuse in-place operations under `no_grad`, or on detached tensors, on what has a gradient."""
    specs = program.graph_signature.input_specs
    names = {spec.arg.name for spec in specs if spec.kind in LEARNING and hasattr(spec.arg, "name")}
    placeholders = program.graph.find_nodes(op="placeholder")
    learning = {node for node in placeholders if node.name in names and _is_floating(node)}
    _check(program.graph_module, learning, is_gradless=False)


def _check(module: fx.GraphModule, learning: set[fx.Node], *, is_gradless: bool) -> None:
    """Check a graph, given those of its inputs that have gradients; `is_gradless`: it is a block under `no_grad`."""
    for node in module.graph.nodes:
        position = BLOCKS.get(node.target)
        if position is not None:
            _check_block(module, node, position, learning, is_gradless)
        for written in _written_by(node):
            base, is_detached = _base_of(written)
            is_of_outside = is_gradless and base.op == "placeholder"
            has_gradient = not is_gradless and any(x in learning for x in node.all_input_nodes if x is not written)
            is_without = is_detached or _is_gradless_result(base)
            if (base in learning and (is_detached or is_of_outside)) or (has_gradient and is_without):
                raise _refusal(node)
            if has_gradient:
                learning.add(base)
        is_cut = is_gradless or node.target is torch.ops.aten.detach.default or _is_gradless_block(node)
        if not is_cut and _is_floating(node) and not learning.isdisjoint(node.all_input_nodes):
            learning.add(node)


def _refusal(node: fx.Node) -> CaptureError:
    return CaptureError(
        f"{where(node)} writes where autograd does not look, under no_grad or through a detached tensor, to what has a "
        "gradient, or makes what has one part of such a tensor. A captured graph would change the gradient. Expected "
        "an operation that is not in place. Write y = y + (f(y) - y).detach() for y = f(y)."
    )


def _check_block(
    module: fx.GraphModule, node: fx.Node, position: int, learning: set[fx.Node], is_gradless: bool
) -> None:
    name, *operands = node.args[position:]
    assert isinstance(name, fx.Node)
    block = module.get_submodule(str(name.target))
    assert isinstance(block, fx.GraphModule)
    pairs = zip(block.graph.find_nodes(op="placeholder"), operands, strict=True)
    inner = {placeholder for placeholder, operand in pairs if operand in learning}
    _check(block, inner, is_gradless=not node.args[0] if node.target is SET_GRAD else is_gradless)


def _is_gradless_block(node: fx.Node) -> bool:
    return node.target is SET_GRAD and not node.args[0]


def _is_gradless_result(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and _is_gradless_block(source)


def _written_by(node: fx.Node) -> list[fx.Node]:
    """The values that an operation writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    arguments = node.target._schema.arguments
    given = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
    written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for value in written if isinstance(value, fx.Node)]


def _base_of(node: fx.Node) -> tuple[fx.Node, bool]:
    """The value that `node` is a view of, and whether one of the views on the way is detached."""
    is_detached = False
    while isinstance(node.args[0] if node.args else None, fx.Node) and _is_view(node):
        is_detached |= node.target is torch.ops.aten.detach.default
        node = node.args[0]  # type: ignore[assignment]
    return node, is_detached


def _is_view(node: fx.Node) -> bool:
    """Whether a result shares the memory of the first operand; what picks one of several views counts, too."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_view_of_several(source)
    return any(result.alias_info is not None for result in target._schema.returns)


def _is_view_of_several(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _is_view(node)


def _is_floating(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) for value in values)
