"""Give every random operation a seed to draw from: for a rank's own tokens or heads its own, else one that all share.

    noise = rand_like(x)      x sharded      ->   own_seed = own_seed()
                                                  noise = rand_like(own_seed, x)           ranks draw apart
    noise = randn([H])        whole          ->   shared_seed = all_reduce(seed_addend())
                                                  noise = randn(shared_seed, [H])          ranks draw the same
    y = sdpa(q, k, v)         of heads       ->   y = sdpa(own_seed, q, k, v)
    y = Mixer(mixer, x)       with dropout   ->   y = Mixer(shared_seed, mixer, x)

Seeds are drawn once a step, at the top of the graph: layers that run again in the backward are given the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from surgery.collectives import all_reduce
from surgery.metadata import KEY, Context, NodeFacts, facts_of
from surgery.pipeline import PassResult
from surgery.placement import PARTIAL, REPLICATED, HeadSharded, Placement, RowSharded, Sharded
from surgery.randomness import SEEDED, draws, own_seed, seed_addend, seeded


@dataclass(frozen=True)
class SeedRandomOperations:
    name: ClassVar[str] = "seed-random-operations"
    requires: ClassVar[frozenset[str]] = frozenset({"lowered", "called"})
    provides: ClassVar[frozenset[str]] = frozenset({"seeded"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        found = find_random_operations(graph, context)
        own = [node for node in found if is_apart(node)]
        shared = [node for node in found if not is_apart(node)]
        seeds = dict.fromkeys(own, insert_own_seed(graph, context)) if own else {}
        seeds |= dict.fromkeys(shared, insert_shared_seed(graph, shared[0], context)) if shared else {}
        for number, node in enumerate(found):
            node.target = SEEDED.get(node.target) or seeded(node.target)  # type: ignore[arg-type]
            node.args = (seeds[node], *node.args)
            node.kwargs = {**node.kwargs, "stream": number * context.axis.size}
        return PassResult(len(found))


def find_random_operations(graph: fx.Graph, context: Context) -> list[fx.Node]:
    """Operators that draw random numbers, calls of modules that do, and attention with dropout."""
    dropping = {site.node for site in context.sites if site.dropout > 0.0}
    return [node for node in graph.nodes if node.op == "call_function" and (node in dropping or is_random(node))]


def is_random(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return draws(node.target, node.args, node.kwargs)
    return getattr(node.target, "is_random", False)


def is_apart(node: fx.Node) -> bool:
    """Whether each rank draws for tokens, or heads, of its own."""
    return any(isinstance(placement, (Sharded, HeadSharded, RowSharded)) for placement in facts_of(node).placements)


def insert_own_seed(graph: fx.Graph, context: Context) -> fx.Node:
    """The seed of this rank, behind the sizes that all of the graph reads."""
    with graph.inserting_after(max(context.sizes.values())):
        return _describe(graph.call_function(own_seed, (), {"axis": context.axis}), REPLICATED, "random")


def insert_shared_seed(graph: fx.Graph, user: fx.Node, context: Context) -> fx.Node:
    """The seed of all ranks, at the same place: brought together where `user` computes, and read on the host."""
    on_axis: dict[str, Any] = {"axis": context.axis}
    with graph.inserting_after(max(context.sizes.values())):
        addend = _describe(graph.call_function(seed_addend, (_device_of(user),), on_axis), PARTIAL, "random")
    with graph.inserting_after(addend):
        whole = _describe(graph.call_function(all_reduce, (addend,), on_axis), REPLICATED, "conversion")
    with graph.inserting_after(whole):
        seed = graph.create_node("call_function", Tensor.cpu, (whole,), name="shared_seed")
    return _describe(seed, REPLICATED, "random")


def _device_of(user: fx.Node) -> torch.device:
    value: Any = user.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    assert isinstance(first, Tensor)
    return first.device


def _describe(seed: fx.Node, placement: Placement, family: str) -> fx.Node:
    seed.meta = {"val": torch.empty((), dtype=torch.int64, device="meta"), KEY: NodeFacts((placement,), family)}
    return seed
