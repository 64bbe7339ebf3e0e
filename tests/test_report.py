"""The report says what the graph does: counts, bytes and placements are checked against first principles."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import transformers
from rich.console import Console
from transformers import AutoModelForSeq2SeqLM

from surgery import transform
from surgery.report.layers import fold_indices, split_path
from surgery.report.report import Report
from surgery.report.text import bytes_text, count_text
from tests.golden import check_golden
from tests.planted import make_planted
from tests.zoo import make_model

SP_SIZE = 4


@pytest.fixture(scope="module")
def llama() -> Any:
    return transform(make_model("llama", num_hidden_layers=2), SP_SIZE)


@pytest.fixture(scope="module")
def planted() -> Any:
    return transform(make_planted("cumsum", num_hidden_layers=2), SP_SIZE)


@pytest.fixture(scope="module")
def bart() -> Any:
    return transform(make_model("bart", auto=AutoModelForSeq2SeqLM, num_hidden_layers=2, decoder_layers=2), SP_SIZE)


def report_of(model: Any) -> Report:
    report: Report = model.surgery.report()
    return report


@pytest.mark.parametrize("width", [100, 140])
def test_golden(llama: Any, width: int) -> None:
    facts, _, _ = report_of(llama).to_text(width).partition("\nPasses")
    check_golden(f"report_llama_{width}.txt", facts.rstrip())


def test_golden_with_gathered_operation(planted: Any) -> None:
    facts, _, _ = report_of(planted).to_text(100).partition("\nPasses")
    check_golden("report_cumsum_100.txt", facts.rstrip())


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_line_overflows(llama: Any, width: int) -> None:
    assert max(map(len, report_of(llama).to_text(width).splitlines())) <= width


def test_print_and_rich_show_the_same(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    report, console = report_of(llama), Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    shown = [line.rstrip() for line in console.export_text().rstrip().splitlines()]
    assert shown == str(report).splitlines() == report.to_text(100).splitlines()


def test_site_bytes_are_the_lower_bound(llama: Any) -> None:
    (row,) = report_of(llama).summary.sites
    heads, kv_heads, head_size, element_size = 8, 4, 8, 4
    assert (row.count, row.path) == (2, "model.layers.{0..1}.self_attn")
    features = 2 * heads // SP_SIZE * head_size + 2 * kv_heads // SP_SIZE * head_size
    assert row.first.forward_bytes_per_token == ((SP_SIZE - 1) * features * element_size,)
    assert row.first.status == "exchanged"


def test_traffic_is_two_all_to_alls_a_call_and_scalars(llama: Any) -> None:
    summary = report_of(llama).summary
    counts = {(row.direction, row.kind): row.count for row in summary.traffic}
    assert counts == {
        ("forward", "all-to-all"): 4,
        ("forward", "all-reduce"): 1,
        ("backward", "all-to-all"): 4,
        ("backward", "all-reduce"): 1,
    }
    exchanged = sum(row.count * row.first.forward_bytes_per_token[0] for row in summary.sites)
    assert summary.traffic[0].bytes_per_token == (exchanged,)


def test_golden_with_two_sequences(bart: Any) -> None:
    text = report_of(bart).to_text(100)
    check_golden("report_bart_100.txt", text[text.index("Attention") : text.index("\nOutputs")].rstrip())


def test_cross_attention_sends_keys_of_the_source_and_queries_of_the_target(bart: Any) -> None:
    summary = report_of(bart).summary
    encoder, own, cross = (row.first.forward_bytes_per_token for row in summary.sites)
    way = (SP_SIZE - 1) * 8 // SP_SIZE * 8 * 4  # 8 heads of 8 floats, of which 1/P goes to each other rank
    assert (encoder, own, cross) == ((4 * way, 0), (0, 4 * way), (2 * way, 2 * way))
    assert summary.traffic[0].bytes_per_token == (2 * (4 + 2) * way, 2 * (4 + 2) * way)


def test_gathered_operation_is_named_and_costed(planted: Any) -> None:
    summary = report_of(planted).summary
    (row,) = summary.gathered
    assert (row.first.operation, row.path) == ("cumsum", "model.layers.0.mlp")
    traffic = {row.kind: row for row in summary.traffic}
    hidden_bytes = 64 * 4
    assert traffic["all-gather"].bytes_per_token == ((SP_SIZE - 1) * hidden_bytes,)
    assert traffic["reduce-scatter"].bytes_per_token == ((SP_SIZE - 1) * hidden_bytes,)


def test_backward_counts_only_where_a_gradient_flows() -> None:
    model = make_model("llama", num_hidden_layers=2).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    counts = {(r.direction, r.kind): r.count for r in report_of(transform(model, SP_SIZE)).summary.traffic}
    assert counts == {("forward", "all-to-all"): 4, ("forward", "all-reduce"): 1, ("backward", "all-reduce"): 1}


def test_replicated_values_are_integers(llama: Any, planted: Any) -> None:
    assert all(row.first.is_integer for row in report_of(llama).summary.whole)
    floating = [row.first.operation for row in report_of(planted).summary.whole if not row.first.is_integer]
    assert floating == ["gather", "cumsum"]


def test_outputs_say_how_to_make_them_whole(llama: Any) -> None:
    loss, logits = report_of(llama).summary.outputs
    assert (loss.name, loss.placement) == ("loss", "replicated")
    assert (logits.name, logits.shape) == ("logits", ("B", "S/P", "99"))
    assert "model.surgery.gather(logits)" in report_of(llama).to_text()


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="doge's masks are refused there: see docs/limits.md")
def test_a_mask_that_is_gathered_is_no_part_of_the_exchange() -> None:
    model = transform(make_model("doge"), 2)
    queries_and_outputs, keys_and_values, float_bytes = 2 * 8 * 8, 2 * 4 * 8, 4
    expected = (queries_and_outputs + keys_and_values) * float_bytes // 2
    assert report_of(model).summary.sites[0].first.forward_bytes_per_token == (expected,)


def test_every_pass_has_a_purpose(llama: Any) -> None:
    assert all(row.purpose for row in report_of(llama).summary.passes)


def test_skips_are_shown(planted: Any) -> None:
    assert "mixes tokens" in report_of(planted).to_text().partition("\nPasses")[2]


def test_dict_is_json(planted: Any) -> None:
    assert json.loads(json.dumps(report_of(planted).to_dict()))["header"]["sp_size"] == SP_SIZE


def test_bypass_is_explained() -> None:
    model = transform(make_model("llama", num_hidden_layers=2), SP_SIZE, disable_in_eval=True).eval()
    assert "disable_in_eval=True, and the model is in eval mode" in report_of(model).to_text(140)


def test_single_rank_has_a_header_only() -> None:
    report = report_of(transform(make_model("llama"), 1))
    assert "sp_size is 1" in report.to_text() and report.summary.sites == ()


@pytest.mark.parametrize(
    ("indices", "text"),
    [([3], "3"), ([0, 1, 2], "0..2"), ([0, 2, 4, 6], "0, 2 .. 6"), ([0, 1, 3, 4], "0..1, 3..4"), ([5, 11], "5, 11")],
)
def test_fold_indices(indices: list[int], text: str) -> None:
    assert fold_indices(indices) == text


def test_split_path() -> None:
    layer, rest = split_path("model.layers.12.mlp.experts.0")
    assert layer is not None
    assert (layer.stack, layer.index, rest) == ("model.layers", 12, "mlp.experts.0")
    assert split_path("lm_head") == (None, "lm_head")


def test_numbers_are_short() -> None:
    assert (bytes_text(129_024), bytes_text(5), count_text(70_553_706_496)) == ("126 KiB", "5 B", "70.6 B")
