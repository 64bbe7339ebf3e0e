"""Give every value its placement, from the inputs forward, by the rule table.

    ids [B, S]           replicated                 integers are cheap: they stay whole
    embedding [B, S, H]  sharded(1)                 the first floating value with a sequence: its ids are sliced
    linear, norm, ...    sharded                    by their rules
    cumsum over S        replicated                 mixes tokens: its operand is gathered (or refused)

Nothing is changed yet: each node's facts say how it will run (`Step`), and insert-conversions makes it so.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from surgery.capture.opaque import OPAQUE
from surgery.errors import UnsupportedOperationError
from surgery.metadata import KEY, Context, NodeFacts, Skip, where
from surgery.pipeline import PassResult
from surgery.placement import PARTIAL, REPLICATED, Placement, Sharded
from surgery.regions import check_border, find_regions, region_of, region_step
from surgery.rules import Call, Step, find_rule
from surgery.rules.call import make_call, replicated, tensor_nodes
from surgery.shapes import length_dims, only_length_dim


@dataclass(frozen=True)
class PropagatePlacements:
    name: ClassVar[str] = "propagate-placements"
    requires: ClassVar[frozenset[str]] = frozenset({"global-sizes", "relaxed-views", "simple-masks"})
    provides: ClassVar[frozenset[str]] = frozenset({"placements"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        found = find_placements(graph, context)
        skips = []
        for node, facts in found.items():
            node.meta[KEY] = facts
            if facts.family == "gathered" and facts.step is not None:
                skips.append(Skip(where(node), facts.reason))
        is_sharded = [any(isinstance(p, Sharded) for p in facts.placements) for facts in found.values()]
        return PassResult(sum(is_sharded), tuple(skips))


def find_placements(graph: fx.Graph, context: Context) -> dict[fx.Node, NodeFacts]:
    """The facts of every node that makes tensors, keyed by node, in graph order."""
    found: dict[fx.Node, NodeFacts] = {}
    regions = find_regions(graph)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found[node] = NodeFacts()
        elif node.target is operator.getitem:
            source = found[node.args[0]]
            found[node] = NodeFacts((source.placements[node.args[1]],), source.family)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            found[node] = _decide(node, found, context, regions)
    return found


def _decide(node: fx.Node, found: dict[fx.Node, NodeFacts], context: Context, regions: frozenset[str]) -> NodeFacts:
    placements: dict[fx.Node, Placement] = {source: found[source].placement for source in tensor_nodes(node)}
    call = make_call(node, placements, context.lengths)
    if node.target is OPAQUE:
        return _gathered(call, context, context.opaque_calls[call.arguments["call"]].why)
    if region_of(node) in regions:
        step = region_step(call)
        return NodeFacts(step.results, "region" if step.is_sharded else "replicated", step)
    for source in placements:
        if found[source].family == "region":
            check_border(source, found)
    call = call.with_placements(tuple(REPLICATED if p == PARTIAL else p for p in placements.values()))
    if not call.sharded:
        return _decide_whole(call)
    row = find_rule(node.target)
    found_step = row.rule(call) if row is not None else None
    if row is not None and found_step is not None:
        return NodeFacts(found_step.results, row.family, found_step)
    return _gathered(call, context, "no rule" if row is None else "mixes tokens")


def _decide_whole(call: Call) -> NodeFacts:
    """An operation on whole values: sharded all the same if its result is floating and has a sequence dimension."""
    row = find_rule(call.node.target)
    if row is not None and _is_heavy(call):
        dims = [only_length_dim(operand.shape, call.lengths) for operand in call.operands]
        tentative = call.with_placements(tuple(REPLICATED if dim is None else Sharded(dim) for dim in dims))
        step = row.rule(tentative) if tentative.sharded or row.creates else None
        if step is not None and step.is_sharded and not _gathers(step, tentative):
            return NodeFacts(step.results, row.family, step)
    step = replicated(call)
    return NodeFacts(step.results, "replicated", step)


def _is_heavy(call: Call) -> bool:
    """Whether a result is floating and has exactly one sequence dimension: what must not be whole on every rank."""
    value = call.node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    is_floating = isinstance(first, Tensor) and first.is_floating_point()
    return is_floating and len(length_dims(call.shape, call.lengths)) == 1


def _gathers(step: Step, call: Call) -> bool:
    pairs = zip(step.operands, call.operands, strict=True)
    return any(operand.is_sharded and placement != operand.placement for placement, operand in pairs)


def _gathered(call: Call, context: Context, reason: str) -> NodeFacts:
    if context.on_unknown == "refuse":
        raise UnsupportedOperationError(
            f'{where(call.node)}: {reason}, so it cannot run on sequence shards. Expected, with on_unknown="refuse", '
            'only operations that keep tokens apart. Use on_unknown="gather" to run it whole on every rank.'
        )
    step = replicated(call)
    return NodeFacts(step.results, "gathered", step, reason)
