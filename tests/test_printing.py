"""The graph printout: what a rank holds beside each value, exchanges marked, identical layers once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from surgery import ConfigurationError, InputError, transform
from surgery.report.printing import GraphPrintout
from tests.golden import check_golden
from tests.planted import make_planted
from tests.zoo import make_model

SP_SIZE = 4


@pytest.fixture(scope="module")
def llama() -> Any:
    return transform(make_model("llama", num_hidden_layers=3), SP_SIZE)


def graph_of(model: Any, layer: int | None = None) -> GraphPrintout:
    printout: GraphPrintout = model.surgery.graph(layer)
    return printout


def titles(printout: GraphPrintout) -> list[tuple[str, int]]:
    return [(section.title, section.count) for section in printout.sections if section.title]


def test_golden(llama: Any) -> None:
    check_golden("graph_llama_100.txt", graph_of(llama).to_text(100))


def test_golden_layer(llama: Any) -> None:
    check_golden("graph_llama_layer_1_140.txt", graph_of(llama, layer=1).to_text(140))


def test_no_line_overflows(llama: Any) -> None:
    for width in (90, 100, 140):
        assert max(map(len, graph_of(llama, layer=1).to_text(width).splitlines())) <= width


def test_identical_layers_are_printed_once(llama: Any) -> None:
    assert titles(graph_of(llama)) == [("model.layers.{0..2}", 3)]


def test_layer_with_another_operation_stands_alone() -> None:
    model = transform(make_planted("cumsum", num_hidden_layers=2), SP_SIZE)
    assert titles(graph_of(model)) == [("model.layers.0", 1), ("model.layers.1", 1)]


def test_layers_with_different_masks_are_not_identical() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = make_model("gemma3_text", num_hidden_layers=4, layer_types=kinds)
    assert titles(graph_of(transform(model, SP_SIZE))) == [("model.layers.{0, 2}", 2), ("model.layers.{1, 3}", 2)]


def test_shapes_are_those_of_one_rank(llama: Any) -> None:
    lines = {line.name: line for section in graph_of(llama).sections for line in section.lines}
    assert lines["input_ids"].type == "i64 [B, S]"
    assert lines["embedding"].type == "f32 [B, S/P, 64]"
    assert lines["attention"].type == "f32 [B, 8/P, S, 8]"
    assert (lines["attention"].placement, lines["exchange_to_heads"].mark) == ("heads(1)", "exchange")


def test_outputs_are_named(llama: Any) -> None:
    assert [(output.name, output.placement) for output in graph_of(llama).outputs] == [
        ("loss", "replicated"),
        ("logits", "sharded(1)"),
    ]


def test_dict_is_json(llama: Any) -> None:
    data = json.loads(json.dumps(graph_of(llama).to_dict()))
    assert data["sections"][1]["count"] == 3


def test_print_graph_prints(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    llama.surgery.print_graph(layer=2)
    assert "model.layers.2" in capsys.readouterr().out


def test_unknown_layer_is_refused(llama: Any) -> None:
    with pytest.raises(InputError, match="expected a layer from 0 to 2, found layer=7"):
        graph_of(llama, layer=7)


def test_single_rank_has_no_graph() -> None:
    with pytest.raises(ConfigurationError, match="sp_size is 1"):
        graph_of(transform(make_model("llama"), 1))
