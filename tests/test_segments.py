"""Segments: where a module's call begins and ends in a graph, and what the graph looks like when they are cut out."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

from surgery import CaptureError, transform
from surgery.programs.segments import OUTSIDE, Cuts, Segment, check_nested, cut_graph, find_segments
from tests.zoo import make_model

NESTED = ("model", "model.embed_tokens", "model.layers.0", "model.layers.0.mlp.up_proj", "model.layers.1", "lm_head")


def rewritten() -> fx.Graph:
    graph: fx.Graph = transform(make_model("llama", num_hidden_layers=2), 2).surgery.programs[0].graph
    return graph


def body_of(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in OUTSIDE]


def test_segments_nest_as_modules_do() -> None:
    segments = find_segments(body_of(rewritten()), NESTED)
    check_nested(segments)
    assert [segment.path for segment in segments] == list(NESTED)
    model, embed, layer, up_proj, other_layer, head = segments
    assert all(model.holds(segment) for segment in segments[:-1])
    assert layer.holds(up_proj) and not layer.holds(other_layer)
    assert embed.stop <= layer.start and layer.stop == other_layer.start and model.stop <= head.start


def cut(graph: fx.Graph, cuts: Cuts) -> dict[str, fx.Graph]:
    """The bodies of all segments by name, and the whole graph as the last."""
    bodies: dict[str, fx.Graph] = {}

    def compile_graph(body: fx.Graph, name: str) -> Any:
        bodies[name.rstrip("0123456789").rstrip("_")] = body
        return lambda *_: None

    bodies["whole"] = cut_graph(graph, cuts, compile_graph)
    return bodies


def parameters_read(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.find_nodes(op="get_attr")} - {"surgery.model"}


def test_parameters_are_read_inside_their_modules_calls() -> None:
    bodies = cut(rewritten(), Cuts(hooked=NESTED))
    inner_first = ["embed_tokens", "layers_0_mlp_up_proj", "layers_0", "layers_1"]
    assert list(bodies) == [*(f"model_{name}" for name in inner_first), "model", "lm_head", "whole"]
    read = {name: parameters_read(body) for name, body in bodies.items()}
    assert read["model_embed_tokens"] == {"model.embed_tokens.weight"}
    assert read["model_layers_0_mlp_up_proj"] == {"model.layers.0.mlp.up_proj.weight"}
    assert "model.layers.0.mlp.up_proj.weight" not in read["model_layers_0"]
    assert len(read["model_layers_1"]) == 9
    assert read["model"] == {"model.norm.weight", "model.rotary_emb.inv_freq"}
    assert read["lm_head"] == {"lm_head.weight"}
    assert read["whole"] == set()


def test_nothing_is_cut_without_hooks() -> None:
    graph = rewritten()
    whole = cut(graph, Cuts())["whole"]
    assert [node.target for node in body_of(whole)] == [node.target for node in body_of(graph)]


def traced_in(*paths: str) -> list[fx.Node]:
    """A chain of operations, each traced in a module, or at the top for an empty path."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for path in paths:
        value = graph.call_function(abs, (value,))
        value.meta["nn_module_stack"] = {path: (path, object)} if path else {}
    return body_of(graph)


def test_a_module_that_is_called_twice_has_two_segments() -> None:
    assert find_segments(traced_in("a", "", "a@1"), {"a"}) == [Segment("a", 0, 1), Segment("a", 2, 3)]


def test_calls_that_are_interleaved_are_refused() -> None:
    segments = find_segments(traced_in("a", "b", "a", "b"), {"a", "b"})
    with pytest.raises(CaptureError, match="the operations of a and b are interleaved"):
        check_nested(segments)
