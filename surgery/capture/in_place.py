"""In-place operations become operations that are not. The common case is rewritten here, the rest by torch.

    y = mul(x, 2); add_(y, z); v = view(y, ...)    ->   y = mul(x, 2); y1 = add(y, z); v = view(y1, ...)
    y = zeros(...); w = y[:, 1:]; copy_(w, z)      ->   y = zeros(...); y1 = slice_scatter(y, z, 1, 1)
    y = mul(x, 2); y[:, 1:] += z, or v = view(y, ...); add_(y, z); sin(v)
                                                   ->   torch's run_decompositions, which traces the graph twice more
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
"""`copy` has no derivative. Written to a part, it becomes `expand_as`; to a whole tensor, it is left to torch."""
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
    """Rewrite a flat graph's in-place operations; False, with nothing changed, where that is left to torch."""
    memory = Memory(graph)
    found: dict[fx.Node, torch._ops.OpOverload] = {}
    for node in memory.writes:
        counterpart = _counterpart(node) if _can_be_rewritten(node, memory) else None
        if counterpart is None:
            return False
        found[node] = counterpart
    latest: dict[StorageWeakRef, fx.Node] = {}
    for node, counterpart in found.items():
        parts, storage = _written_parts(node), memory.storage(node)
        whole = latest.get(storage, _whole(node))
        latest[storage] = _value_after(node, whole, counterpart)
        node.replace_all_uses_with(latest[storage])
        for user in [user for user in whole.users if memory.is_before(node, user)]:
            user.replace_input_with(whole, latest[storage])
        for unused in (node, *parts):
            graph.erase_node(unused)
    return True


def _value_after(write: fx.Node, whole: fx.Node, counterpart: torch._ops.OpOverload) -> fx.Node:
    """Insert, before a write, the value of the whole tensor after it. Parts are taken of what the tensor is by then."""
    parts, graph = _written_parts(write), write.graph

    def insert(target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        node.meta = {**write.meta, "val": value}
        return node

    with graph.inserting_before(write):
        anew: dict[fx.Node, fx.Node] = {}
        source = whole
        for part in reversed(parts):
            source = anew[part] = insert(part.target, (source, *part.args[1:]), part.kwargs, part.meta["val"])
        args, kwargs = pytree.tree_map_only(fx.Node, lambda node: anew.get(node, node), (write.args, write.kwargs))
        if write.target is COPY:  # copy_(part, source) gives expand_as(source, part)
            args = args[::-1]
        result = insert(counterpart, args, kwargs, write.meta["val"])
        for part in parts:
            source = anew[part].all_input_nodes[0]
            given = (source, result, *part.args[1:])
            result = insert(SCATTERS[part.target], given, part.kwargs, source.meta["val"])
    return result


def _written_parts(write: fx.Node) -> list[fx.Node]:
    """The slices and selections made only to be written to, innermost first."""
    parts: list[fx.Node] = []
    user, written = write, written_by(write)[0]
    while written.target in SCATTERS and list(written.users) == [user]:
        parts.append(written)
        user, written = written, written.all_input_nodes[0]
    return parts


def _whole(write: fx.Node) -> fx.Node:
    """The tensor that a write changes, or changes parts of."""
    parts = _written_parts(write)
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

    def storage(self, write: fx.Node) -> StorageWeakRef:
        """What an in-place operation of one tensor writes to."""
        (storage,) = self._storages[write]
        return storage

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


def _can_be_rewritten(node: fx.Node, memory: Memory) -> bool:
    """Whether an operation made what `node` writes to, and no view of it is read after a write that it comes before."""
    whole, sharing, parts = _whole(node), memory.sharing(node), _written_parts(node)
    if len(written_by(node)) > 1 or whole not in sharing or (parts and node.users):
        return False
    maker = sharing[0]
    is_no_view = _is_made_by(whole, maker) or bool(written_by(whole))
    if maker.op != "call_function" or is_view(maker) or not is_no_view:
        return False
    writes = [other for other in sharing if written_by(other)]
    known = {*writes, *(part for write in writes for part in _written_parts(write))}
    views = [other for other in sharing if not _is_made_by(other, maker) and other not in known]
    return all(_is_read_in_time(view, writes, memory) for view in views)


def _is_read_in_time(view: fx.Node, writes: list[fx.Node], memory: Memory) -> bool:
    """Whether all reads of a view come before the next write, so that it shows the value that it was taken of."""
    following = next((write for write in writes if memory.is_before(view, write)), None)
    return following is None or all(memory.is_before(user, following) for user in view.users)


def _counterpart(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operation that gives what `node` writes, of the same type and with a derivative; None where there is none."""
    target: Any = node.target
    if target is COPY:
        return _counterpart_of_copy(node)
    if torch.Tag.inplace_view in target.tags:  # t_() and the like: parts that were taken before are of another shape
        return None
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
    return found if _is_alike(result, written) else None


def _counterpart_of_copy(node: fx.Node) -> torch._ops.OpOverload | None:
    is_blocking = len(node.args) == 2 and not node.kwargs
    if not _written_parts(node) or not is_blocking:
        return None
    is_alike = _is_alike(node.all_input_nodes[-1].meta["val"], node.meta["val"])
    return torch.ops.aten.expand_as.default if is_alike else None


def _is_alike(value: Any, other: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dtype == other.dtype and value.device == other.device
