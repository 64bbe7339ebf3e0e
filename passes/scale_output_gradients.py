"""Choose the scale of the backward's seed, so that the ranks' gradients combine to the unsharded one.

    gradients="mean"   every rank starts from 1:    the average over the ranks is the gradient   (DDP, FSDP, ZeRO)
    gradients="sum"    every rank starts from 1/P:  the sum over the ranks is the gradient

A whole output, like the loss, is one value that P ranks hold: each rank's backward adds its part, and all of them
start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from surgery.collectives import scale_gradient
from surgery.metadata import KEY, Context, NodeFacts, facts_of
from surgery.pipeline import PassResult
from surgery.placement import Replicated


@dataclass(frozen=True)
class ScaleOutputGradients:
    name: ClassVar[str] = "scale-output-gradients"
    requires: ClassVar[frozenset[str]] = frozenset({"converted"})
    provides: ClassVar[frozenset[str]] = frozenset({"scaled"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        if context.gradients == "mean":
            return PassResult(0)
        output = next(iter(reversed(graph.nodes)))
        whole = find_whole_outputs(output)
        for source in whole:
            with graph.inserting_before(output):
                scaled = graph.call_function(scale_gradient, (source, 1.0 / context.axis.size))
            scaled.meta = {"val": source.meta["val"], KEY: NodeFacts(family="conversion")}
            output.replace_input_with(source, scaled)
        return PassResult(len(whole))


def find_whole_outputs(output: fx.Node) -> list[fx.Node]:
    """The floating outputs that every rank holds whole."""
    return [
        source
        for source in output.all_input_nodes
        if isinstance(source.meta.get("val"), Tensor)
        and source.meta["val"].is_floating_point()
        and isinstance(facts_of(source).placement, Replicated)
    ]
