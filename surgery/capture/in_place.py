"""In-place operations become operations that are not: on what nobody looks at until then here, others by torch.

    y = mul(x, 2); add_(y, z); v = view(y, ...)    ->   y = mul(x, 2); y1 = add(y, z); v = view(y1, ...)
    y = mul(x, 2); v = view(y, ...); add_(y, z)    ->   run_decompositions, which traces the graph twice more
    y = mul(x, 2); v = einsum("ij->ji", y); add_(y, z)  refused: torch takes v for a copy, as its schema says so

A mixture of experts would need torch's way for one `index_put_`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from passes.inline_blocks import inline_all
from surgery.capture.gradless_writes import base_of, is_view, written_by
from surgery.errors import CaptureError
from surgery.metadata import where
from surgery.private import functionalized
from surgery.randomness import draws
from surgery.rules.table import operation_name

DROPOUTS = ("aten::dropout", "aten::alpha_dropout", "aten::feature_dropout", "aten::feature_alpha_dropout")
"""Their result is their operand itself where they are off, which a trace does not tell."""
Memory = dict[fx.Node, set[StorageWeakRef]]


def without_writes(program: ExportedProgram) -> ExportedProgram:
    """A flat program without in-place operations that computes the same.

    Raises `CaptureError` where something looks at what is written through a view that torch does not know as one.
    """
    inline_all(program.graph)  # torch.export forgets about no_grad blocks on its way
    drop_idle_dropout(program.graph)
    refuse_hidden_views(program.graph)
    if write_out_of_place(program.graph):
        return program
    program.graph_module.recompile()
    return functionalized(program)


def drop_idle_dropout(graph: fx.Graph) -> None:
    """Put their operands in the place of dropouts that are off."""
    for node in list(graph.nodes):
        is_dropout = isinstance(node.target, torch._ops.OpOverload) and operation_name(node.target) in DROPOUTS
        if is_dropout and not draws(node.target, node.args, node.kwargs):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def refuse_hidden_views(graph: fx.Graph) -> None:
    """Refuse to write to memory that the result of an operation shares whose schema tells of no view."""
    memory = _memory(graph)
    for node in _writes(graph):
        base, _ = base_of(written_by(node)[0])
        for other in _sharing(base, memory):
            if other not in _makers(base) and not is_view(other):
                raise CaptureError(
                    f"{where(node)} writes to memory that the result of {where(other)} shares, which torch takes for a "
                    "copy in a graph. Expected an operation that is not in place, or a clone() of that result."
                )


def write_out_of_place(graph: fx.Graph) -> bool:
    """Rewrite a flat graph's in-place operations; False, with nothing changed, where views see one."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    writes, memory = _writes(graph), _memory(graph)
    if not all(_is_unseen_until_written(node, memory, place) and _counterpart(node) is not None for node in writes):
        return False
    for node in writes:
        (written,) = written_by(node)
        with graph.inserting_after(node):
            result = graph.call_function(_counterpart(node), node.args, node.kwargs)  # type: ignore[arg-type]
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        for user in [user for user in written.users if place.get(user, -1) > place[node]]:
            user.replace_input_with(written, result)
        graph.erase_node(node)
    return True


def _writes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if written_by(node)]


def _memory(graph: fx.Graph) -> Memory:
    """Where the traced values of each node lie."""
    found = {}
    for node in graph.nodes:
        leaves = pytree.tree_leaves(node.meta.get("val"))
        found[node] = {StorageWeakRef(leaf.untyped_storage()) for leaf in leaves if isinstance(leaf, Tensor)}
    return found


def _sharing(base: fx.Node, memory: Memory) -> list[fx.Node]:
    return [node for node, its in memory.items() if its & memory[base]]


def _makers(base: fx.Node) -> set[Any]:
    """What made a value: itself, and the operation of several results that it is picked from."""
    return {base, *(base.args[:1] if base.target is operator.getitem else ())}


def _is_unseen_until_written(node: fx.Node, memory: Memory, place: dict[fx.Node, int]) -> bool:
    """Whether an operation made what `node` writes to, and there is no view of it before the last write to it."""
    (written, *others) = written_by(node)
    base, is_detached = base_of(written)
    is_made = base.op == "call_function" and bool(memory[base])
    sharing = [other for other in _sharing(base, memory) if other not in _makers(base)]
    last = max(place[other] for other in sharing if written_by(other))
    views_follow = all(place[other] > last for other in sharing if not written_by(other))
    return is_made and not is_detached and not others and views_follow


def _counterpart(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operation that gives what `node` writes, of the same type; None where there is none."""
    target: Any = node.target
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    found: Any = getattr(packet, target._overloadname, None)
    if not target._schema.name.endswith("_") or found is None or found._schema.is_mutable:
        return None
    if [a.name for a in found._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    args, kwargs = pytree.tree_map_only(fx.Node, lambda source: source.meta["val"], (node.args, node.kwargs))
    written: Tensor = node.meta["val"]
    with written.fake_mode:  # type: ignore[attr-defined]
        result = found(*args, **kwargs)
    is_alike = isinstance(result, Tensor) and result.dtype == written.dtype and result.device == written.device
    return found if is_alike else None
