"""Gradient checkpointing: a layer's nodes become one function that is run again in the backward.

    x1 = linear(x0); ...; x9 = add(x1, x8)     ->     x9 = layer_0(self, x0)      saves x0, recomputes x1 ... x8

It is honoured where the model asks for it: `model.gradient_checkpointing_enable()` switches it on in the decoder
layers, and those are what is cut out here. Collectives in a layer run again too, in the same order on every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

OUTSIDE = ("placeholder", "get_attr", "output")


def checkpointed_layers(model: nn.Module) -> tuple[str, ...]:
    """The paths of the layers whose activations the model asks to recompute."""
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and module.training
    )


def cut_layers(graph: fx.Graph, layers: tuple[str, ...], compile_graph: Callable[[fx.Graph, str], Any]) -> fx.Graph:
    """A copy of `graph` in which each of `layers` is one call of a checkpointed function.

    `compile_graph(body, name)` turns the graph of a layer into a function of the model and the layer's inputs.
    """
    segments = {nodes[0]: nodes for layer in layers if (nodes := _nodes_of(graph, layer))}
    inside = {node for nodes in segments.values() for node in nodes}
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in segments:
            _call_segment(copy, values, segments[node], compile_graph)
        elif node.op == "output":
            copy.output(fx.map_arg(node.args[0], lambda source: values[source]))
        elif node not in inside:
            values[node] = copy.node_copy(node, lambda source: values[source])
    return copy


def _nodes_of(graph: fx.Graph, layer: str) -> list[fx.Node]:
    """The run of nodes from the first to the last that was traced in `layer`."""
    nodes = [node for node in graph.nodes if node.op not in OUTSIDE]
    own = [index for index, node in enumerate(nodes) if _is_in(node, layer)]
    return nodes[own[0] : own[-1] + 1] if own else []


def _is_in(node: fx.Node, layer: str) -> bool:
    return any(path == layer for path, _ in (node.meta.get("nn_module_stack") or {}).values())


def _call_segment(
    copy: fx.Graph, values: dict[fx.Node, fx.Node], nodes: list[fx.Node], compile_graph: Callable[[fx.Graph, str], Any]
) -> None:
    """Append the call of the function made of `nodes`; `values` remembers what it gives for those used later."""
    members = set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in members)
    inputs = [source for source in sources if source.op != "get_attr"]
    results = [node for node in nodes if any(user not in members for user in node.users)]
    name = f"layer_{len(copy.nodes)}"
    function = _checkpointed(compile_graph(_body(nodes, list(sources), results), name), name)
    model = copy.get_attr("surgery.model")
    call = copy.call_function(function, (model, *(values[source] for source in inputs)))
    for index, result in enumerate(results):
        values[result] = copy.call_function(operator.getitem, (call, index))


def _body(nodes: list[fx.Node], sources: list[fx.Node], results: list[fx.Node]) -> fx.Graph:
    """The graph of a layer alone: its inputs, its parameters looked up on the model, its nodes, its results."""
    body, values = fx.Graph(), {}
    for source in sorted(sources, key=lambda source: source.op == "get_attr"):
        is_parameter = source.op == "get_attr"
        values[source] = body.get_attr(str(source.target)) if is_parameter else body.placeholder(source.name)
    for node in nodes:
        values[node] = body.node_copy(node, lambda source: values[source])
    body.output(tuple(values[result] for result in results))
    return body


def _checkpointed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(model: nn.Module, *inputs: Any) -> Any:
        return checkpoint(function, model, *inputs, use_reentrant=False)

    run.__name__ = run.__qualname__ = name
    return run
