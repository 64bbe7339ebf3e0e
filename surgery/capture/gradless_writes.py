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

from passes.inline_blocks import BLOCKS, SET_GRAD, is_gradless, open_block
from surgery.capture.exporting import specs_by_name
from surgery.errors import CaptureError
from surgery.metadata import where
from surgery.rules.call import bind_arguments

LEARNING = (InputKind.PARAMETER, InputKind.USER_INPUT)


def refuse_gradless_writes(program: ExportedProgram) -> None:
    """Refuse in-place operations under `no_grad`, or on detached tensors, on what has a gradient."""
    names = {name for name, spec in specs_by_name(program).items() if spec.kind in LEARNING}
    placeholders = program.graph.find_nodes(op="placeholder")
    learning = {node for node in placeholders if node.name in names and _is_floating(node)}
    _check(program.graph_module, learning, is_under_no_grad=False)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The values that an operation writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    given = bind_arguments(node)
    arguments = node.target._schema.arguments
    written = [given[a.name] for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for value in pytree.tree_leaves(written) if isinstance(value, fx.Node)]


def _check(module: fx.GraphModule, learning: set[fx.Node], *, is_under_no_grad: bool) -> None:
    """Check a graph, or that of a block, given those of its inputs that have gradients."""
    for node in module.graph.nodes:
        if node.target in BLOCKS:
            _check_block(module, node, learning, is_under_no_grad)
        for written in written_by(node):
            base, is_detached = _base_of(written)
            is_of_outside = is_under_no_grad and base.op == "placeholder"
            has_gradient = not is_under_no_grad and any(x in learning for x in node.all_input_nodes if x is not written)
            is_without = is_detached or _is_gradless_result(base)
            if (base in learning and (is_detached or is_of_outside)) or (has_gradient and is_without):
                raise _refusal(node)
            if has_gradient:
                learning.add(base)
        is_cut = is_under_no_grad or node.target is torch.ops.aten.detach.default or is_gradless(node)
        if not is_cut and _is_floating(node) and not learning.isdisjoint(node.all_input_nodes):
            learning.add(node)


def _refusal(node: fx.Node) -> CaptureError:
    return CaptureError(
        f"{where(node)} writes where autograd does not look, under no_grad or through a detached tensor, to what has a "
        "gradient, or makes what has one part of such a tensor. A captured graph would change the gradient. Expected "
        "an operation that is not in place. Write y = y + (f(y) - y).detach() for y = f(y)."
    )


def _check_block(module: fx.GraphModule, node: fx.Node, learning: set[fx.Node], is_under_no_grad: bool) -> None:
    block, operands = open_block(module, node)
    pairs = zip(block.graph.find_nodes(op="placeholder"), operands, strict=True)
    inner = {placeholder for placeholder, operand in pairs if operand in learning}
    _check(block, inner, is_under_no_grad=is_gradless(node) if node.target is SET_GRAD else is_under_no_grad)


def _is_gradless_result(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and is_gradless(source)


def _base_of(node: fx.Node) -> tuple[fx.Node, bool]:
    """The value that `node` is a view of, and whether one of the views on the way is detached."""
    is_detached = False
    while isinstance(node.args[0] if node.args else None, fx.Node) and is_view(node):
        is_detached |= node.target is torch.ops.aten.detach.default
        node = node.args[0]  # type: ignore[assignment]
    return node, is_detached


def is_view(node: fx.Node) -> bool:
    """Whether a result shares the memory of the first operand; what picks one of several views counts, too."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        source = node.args[0] if node.args else None
        return isinstance(source, fx.Node) and _is_view_of_several(source)
    return any(result.alias_info is not None for result in target._schema.returns)


def _is_view_of_several(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and is_view(node)


def _is_floating(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) for value in values)
