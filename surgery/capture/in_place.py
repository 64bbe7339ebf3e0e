"""In-place operations become operations that are not. The common case is rewritten here, the rest by torch.

    y = mul(x, 2); add_(y, z); v = view(y, ...)    ->   y = mul(x, 2); y1 = add(y, z); v = view(y1, ...)
    y = zeros(...); w = y[:, 1:]; copy_(w, z)      ->   y = zeros(...); y1 = slice_scatter(y, z, 1, 1)
    y = mul(x, 2); v = view(y, ...); add_(y, z)    ->   torch's run_decompositions, which traces the graph twice more
    y = mul(x, 2); v = einsum("ij->ji", y); add_(y, z)  refused: v sees the write, and torch takes it for a copy

What shares memory is read from the traced values. Schemas say less: `einsum` may give a view, `contiguous` a copy.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from passes.inline_blocks import inline_all
from passes.remove_no_ops import is_idle_dropout
from surgery.capture.gradless_writes import is_view, written_by
from surgery.errors import CaptureError
from surgery.metadata import where
from surgery.private import functionalized

COPY = torch.ops.aten.copy_.default
"""Its counterpart has no derivative. To a part, it is `expand_as`; to a whole, it is left to `functionalized`."""
SCATTERS: dict[Any, Any] = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}
"""What picks a part of a tensor, and what gives the tensor with that part replaced."""
FRESH = torch.ops.aten.lift_fresh_copy.default
"""What `torch.tensor(...)` leaves: a copy of a constant, which a trace takes for the constant itself."""


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
        if is_idle_dropout(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def refuse_hidden_views(graph: fx.Graph) -> None:
    """Refuse to write to memory that is then read through a view of which no schema tells."""
    memory = Memory(graph)
    for write in memory.writes:
        for view in (view for written in written_by(write) for view in _hidden_views(written, write, memory)):
            raise CaptureError(
                f"{where(write)} writes to memory that the result of {where(view)} shares, and torch takes that for a "
                "copy in a graph. Expected an operation that is not in place, or a clone() of that result."
            )


def write_out_of_place(graph: fx.Graph) -> bool:
    """Rewrite a flat graph's in-place operations; False, with nothing rewritten, where views see one."""
    _move_parts_to_their_writes(graph)
    memory = Memory(graph)
    found: dict[fx.Node, torch._ops.OpOverload] = {}
    for node in memory.writes:
        counterpart = _counterpart(node) if _is_unseen_until_written(node, memory) else None
        if counterpart is None:
            return False
        found[node] = counterpart
    for node, counterpart in found.items():
        whole, result = _whole(node), _write_to_copy(node, counterpart)
        node.replace_all_uses_with(result)
        for user in [user for user in whole.users if memory.is_before(node, user)]:
            user.replace_input_with(whole, result)
        graph.erase_node(node)
    return True


def _write_to_copy(write: fx.Node, counterpart: torch._ops.OpOverload) -> fx.Node:
    """What an operation writes to as it is afterwards, in front of the operation."""
    parts = _parts(write)
    arguments = write.args[::-1] if write.target is COPY else write.args
    with write.graph.inserting_before(write):
        result = write.graph.call_function(counterpart, arguments, write.kwargs)
        result.meta = dict(write.meta)
        for part in parts:
            source, *rest = part.args
            result = write.graph.call_function(SCATTERS[part.target], (source, result, *rest), part.kwargs)
            result.meta = {**write.meta, "val": part.all_input_nodes[0].meta["val"]}
    return result


def _move_parts_to_their_writes(graph: fx.Graph) -> None:
    """Take a part of a tensor where it is written to, so that it is taken of what the tensor is by then."""
    for node in graph.nodes:
        for part in reversed(_parts(node)) if written_by(node) else ():
            node.prepend(part)


def _parts(write: fx.Node) -> list[fx.Node]:
    """The parts of parts of a tensor that are taken to write to the smallest of them, which comes first."""
    parts: list[fx.Node] = []
    user, written = write, written_by(write)[0]
    while written.target in SCATTERS and list(written.users) == [user]:
        parts.append(written)
        user, written = written, written.all_input_nodes[0]
    return parts


def _whole(write: fx.Node) -> fx.Node:
    """What an operation writes to, of which its parts are taken."""
    parts = _parts(write)
    return parts[-1].all_input_nodes[0] if parts else written_by(write)[0]


class Memory:
    """Where the traced values of a graph lie, and in which order its nodes come."""

    def __init__(self, graph: fx.Graph) -> None:
        self.writes = [node for node in graph.nodes if written_by(node)]
        self._places = {node: place for place, node in enumerate(graph.nodes)}
        self._storages = {node: _storages(node) for node in graph.nodes}
        self._by_storage: dict[StorageWeakRef, list[fx.Node]] = defaultdict(list)
        for node, storages in self._storages.items():
            for storage in storages if not _is_copied(node) else ():
                self._by_storage[storage].append(node)

    def is_before(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether `one` comes before `other`; nodes that were made later come before none and after none."""
        return other in self._places and self._places[one] < self._places[other]

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that have memory in common with `node`, itself among them; what made it is the first."""
        found = {other for storage in self._storages[node] for other in self._by_storage[storage]}
        return sorted(found, key=self._places.__getitem__)


def _storages(node: fx.Node) -> set[StorageWeakRef]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {StorageWeakRef(leaf.untyped_storage()) for leaf in leaves if isinstance(leaf, Tensor)}


def _is_copied(node: fx.Node) -> bool:
    """Whether it is a constant that is read by copies alone."""
    return node.op != "call_function" and bool(node.users) and all(user.target is FRESH for user in node.users)


def _is_made_by(node: fx.Node, maker: fx.Node) -> bool:
    """Whether it is the operation that made the memory, or one of that operation's several results."""
    return node is maker or (node.target is operator.getitem and node.args[0] is maker)


def _hidden_views(written: fx.Node, write: fx.Node, memory: Memory) -> Iterator[fx.Node]:
    """The views that no schema tells of, through which a write goes, or what it wrote is read."""
    sharing = memory.sharing(written)
    for node in sharing:
        is_known = _is_made_by(node, sharing[0]) or node.target is FRESH or is_view(node) or bool(written_by(node))
        if node.op != "call_function" or is_known or not memory.is_before(node, write):
            continue
        views = _views_of(node, sharing)
        if written in views or any(memory.is_before(write, user) for view in views for user in view.users):
            yield node


def _views_of(view: fx.Node, sharing: list[fx.Node]) -> set[fx.Node]:
    """A view, and the views of it, in memory that `sharing` has, in order."""
    found = {view}
    for node in sharing:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_unseen_until_written(node: fx.Node, memory: Memory) -> bool:
    """Whether an operation made what `node` writes to, and no view of it is read after a write that it comes before."""
    whole, sharing = _whole(node), memory.sharing(node)
    is_read_as_part = bool(_parts(node) and node.users)
    if len(written_by(node)) > 1 or whole not in sharing or is_read_as_part:
        return False
    maker = sharing[0]
    is_whole = _is_made_by(whole, maker) or bool(written_by(whole))
    if maker.op != "call_function" or is_view(maker) or not is_whole:
        return False
    writes = [other for other in sharing if written_by(other)]
    own = {*writes, *(part for write in writes for part in _parts(write))}
    views = [other for other in sharing if not _is_made_by(other, maker) and other not in own]
    return all(_is_read_in_time(view, writes, memory) for view in views)


def _is_read_in_time(view: fx.Node, writes: list[fx.Node], memory: Memory) -> bool:
    """Whether what reads a view does so before the next write, and sees what the view was taken of."""
    following = next((write for write in writes if memory.is_before(view, write)), None)
    return following is None or all(memory.is_before(user, following) for user in view.users)


def _counterpart(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operation that gives what `node` writes, of the same type and with a derivative; None where there is none."""
    target: Any = node.target
    written: Tensor = node.meta["val"]
    if target is COPY:
        is_to_part = bool(_parts(node)) and len(node.args) == 2
        is_plain = is_to_part and _is_alike(node.all_input_nodes[-1].meta["val"], written)
        return torch.ops.aten.expand_as.default if is_plain else None
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    found: Any = getattr(packet, target._overloadname, None)
    if not target._schema.name.endswith("_") or found is None or found._schema.is_mutable:
        return None
    if [a.name for a in found._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    args, kwargs = pytree.tree_map_only(fx.Node, lambda source: source.meta["val"], (node.args, node.kwargs))
    with written.fake_mode:  # type: ignore[attr-defined]
        result = found(*args, **kwargs)
    return found if _is_alike(result, written) else None


def _is_alike(value: Any, other: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dtype == other.dtype and value.device == other.device
