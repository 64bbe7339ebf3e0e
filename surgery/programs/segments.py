"""Segments: parts of a graph that run inside the call of the module they were traced in.

    x1 = embedding(w, ids)                                   x1 = embed_tokens(ids)       hooks of embed_tokens
    x2 = rms_norm(x1, w0); ...; x9 = add(x8, x1)      ->     x9 = layers.0(x1)            hooks of layers.0
    x10 = linear(x9, w)                                      x10 = lm_head(x9)            hooks of lm_head

One flat graph calls no submodule, and an engine that gathers a module's parameters before its forward and releases
them behind it would never be asked to. So where a module carries hooks, its nodes become a function, and that function
its forward for the time of one real call: what comes in and goes out are the segment's tensors. Segments nest as
modules do. A layer whose activations are to be recomputed is a segment as well, with or without hooks.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from surgery.errors import CaptureError

OUTSIDE = ("placeholder", "get_attr", "output")
REPETITION = re.compile(r"@\d+")  # torch.export marks the second call of a module so

Function = Callable[..., Any]
Compile = Callable[[fx.Graph, str], Function]


@dataclass(frozen=True)
class Cuts:
    """Which modules' nodes become segments: those `hooked` by an engine, and those `checkpointed`."""

    hooked: tuple[str, ...] = ()
    checkpointed: tuple[str, ...] = ()

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self.hooked) | frozenset(self.checkpointed)

    def without(self, called: Collection[str]) -> Cuts:
        """The cuts to make where the graph itself calls the modules at `called`: their own call does the rest."""
        hooked, checkpointed = ([p for p in paths if p not in called] for paths in (self.hooked, self.checkpointed))
        return Cuts(tuple(hooked), tuple(checkpointed))


@dataclass(frozen=True)
class Segment:
    """One call of the module at `path`: the nodes `start` to `stop` (exclusive) of a graph's calls."""

    path: str
    start: int
    stop: int

    def holds(self, other: Segment) -> bool:
        return self.start <= other.start and other.stop <= self.stop


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `F.linear` is by then: ZeRO 3 puts a function there that keeps no gathered weight for the backward."""
    return F.linear(x, weight, bias)


REPLACED: dict[Any, Function] = {torch.ops.aten.linear.default: linear}


def find_segments(nodes: list[fx.Node], paths: Collection[str]) -> list[Segment]:
    """The calls of the modules at `paths`, outer ones first, each from the first to the last node traced in it."""
    spans: dict[tuple[str, str], list[int]] = {}
    depths: dict[tuple[str, str], int] = {}
    for index, node in enumerate(nodes):
        for depth, (key, (path, _)) in enumerate((node.meta.get("nn_module_stack") or {}).items()):
            if (name := REPETITION.sub("", path)) in paths:
                spans.setdefault((key, name), []).append(index)
                depths.setdefault((key, name), depth)
    order = sorted(spans, key=lambda call: (spans[call][0], -spans[call][-1], depths[call]))
    return [Segment(call[1], spans[call][0], spans[call][-1] + 1) for call in order]


def check_nested(segments: list[Segment]) -> None:
    """Raise `CaptureError` if two calls overlap without one being inside the other."""
    around: list[Segment] = []
    for segment in segments:
        while around and around[-1].stop <= segment.start:
            around.pop()
        if around and not around[-1].holds(segment):
            raise CaptureError(
                f"the operations of {around[-1].path} and {segment.path} are interleaved in the captured graph, so "
                "that neither can be called alone. Expected one after the other, as hooks or gradient checkpointing on "
                "both need it. Shard or checkpoint the module that contains both instead."
            )
        around.append(segment)


def cut_graph(graph: fx.Graph, cuts: Cuts, compile_graph: Compile) -> fx.Graph:
    """A copy of `graph` in which each segment is one call.

    `compile_graph(body, name)` turns the graph of a segment into a function of the model and the segment's inputs.
    """
    nodes = [node for node in graph.nodes if node.op not in OUTSIDE]
    segments = find_segments(nodes, cuts.paths)
    check_nested(segments)
    cutter = _Cutter(nodes, segments, cuts, compile_graph)
    return cutter.build(Segment("", 0, len(nodes)), graph.find_nodes(op="placeholder"), graph.output_node().args[0])


@dataclass(frozen=True)
class _Cutter:
    """Builds the graph of a segment, with a call where another segment begins. The whole graph is a segment too."""

    nodes: list[fx.Node]
    segments: list[Segment]
    cuts: Cuts
    compile_graph: Compile

    def build(self, span: Segment, inputs: list[fx.Node], results: Any) -> fx.Graph:
        body = fx.Graph()
        values = {source: body.placeholder(source.name) for source in inputs}
        inner = self._directly_inside(span)
        position = span.start
        while position < span.stop:
            segment = inner.get(position)
            if segment is not None:
                self._call(body, values, segment)
            else:
                node = self.nodes[position]
                values[node] = body.node_copy(node, lambda source: _lookup(body, values, source))
                values[node].target = REPLACED.get(node.target, node.target) if self.cuts.hooked else node.target
            position = segment.stop if segment is not None else position + 1
        body.output(fx.map_arg(results, lambda source: _lookup(body, values, source)))
        return body

    def _directly_inside(self, span: Segment) -> dict[int, Segment]:
        """The outermost segments within `span`, by where they start."""
        found: dict[int, Segment] = {}
        stop = span.start
        later = self.segments[self.segments.index(span) + 1 :] if span in self.segments else self.segments
        for segment in later:
            if segment.start >= stop and span.holds(segment):
                found[segment.start] = segment
                stop = segment.stop
        return found

    def _call(self, body: fx.Graph, values: dict[fx.Node, fx.Node], segment: Segment) -> None:
        """Append the call of a segment; `values` remembers what it gives for those used later."""
        members = self.nodes[segment.start : segment.stop]
        inside = set(members)
        sources = dict.fromkeys(source for node in members for source in node.all_input_nodes if source not in inside)
        inputs = [source for source in sources if source.op != "get_attr"]
        results = [node for node in members if any(user not in inside for user in node.users)]
        name = f"{segment.path.replace('.', '_')}_{segment.start}"
        returned = results[0] if len(results) == 1 else tuple(results)
        function = self.compile_graph(self.build(segment, inputs, returned), name)
        call = body.call_function(
            self._runner(segment, function, inputs, name),
            (body.get_attr("surgery.model"), *(_lookup(body, values, source) for source in inputs)),
        )
        if len(results) == 1:
            values[results[0]] = call
            return
        for index, result in enumerate(results):
            values[result] = body.call_function(operator.getitem, (call, index))

    def _runner(self, segment: Segment, function: Function, inputs: list[fx.Node], name: str) -> Function:
        """What the graph calls: `function`, in a call of its module if that is hooked, recomputed if asked for."""
        if segment.path in self.cuts.hooked:
            function = in_module(segment.path, function, [isinstance(x.meta.get("val"), Tensor) for x in inputs])
        if segment.path in self.cuts.checkpointed:
            function = recomputed(function)
        if segment.path in self.cuts.hooked:
            function = torch.compiler.disable(function)  # hooks run as they are, and so does what is between them
        function.__name__ = function.__qualname__ = name
        return function


def _lookup(body: fx.Graph, values: dict[fx.Node, fx.Node], source: fx.Node) -> fx.Node:
    """`source` in `body`. A parameter is read where it is first used: before its module's call it may be elsewhere."""
    if source.op == "get_attr" and source not in values:
        values[source] = body.get_attr(str(source.target))
    return values[source]


def in_module(path: str, function: Function, is_tensor: list[bool]) -> Function:
    """`function` as the forward of the module at `path`, which is really called. Its hooks see tensors only."""

    def run(model: nn.Module, *inputs: Any) -> Any:
        def forward(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return function(model, *(next(given) if t else x for t, x in zip(is_tensor, inputs, strict=True)))

        module = model.get_submodule(path)
        previous = module.__dict__.get("forward")
        module.forward = forward
        try:
            # not module(...): transformers' layers would checkpoint themselves there, and `recomputed` does
            return nn.Module.__call__(module, *(x for t, x in zip(is_tensor, inputs, strict=True) if t))
        finally:
            del module.forward
            if previous is not None:
                module.forward = previous

    return run


def recomputed(function: Function) -> Function:
    """`function`, run again in the backward instead of keeping what it computes on the way."""

    def run(model: nn.Module, *inputs: Any) -> Any:
        return checkpoint(function, model, *inputs, use_reentrant=False)

    return run
