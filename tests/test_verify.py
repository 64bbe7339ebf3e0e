"""`surgery verify` and the sweep: the outcomes, and that a wrong model would be found out."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from surgery import collectives
from surgery.capture.capture import capture
from surgery.cli import main
from surgery.errors import CaptureError
from surgery.verify import ranks
from surgery.verify.batches import KINDS, find_families, make_batch
from surgery.verify.catalog import Architecture, find_architecture, list_architectures
from surgery.verify.comparison import TOLERANCE
from surgery.verify.coverage import coverage_page
from surgery.verify.forked import can_fork, run_forked
from surgery.verify.ranks import RankPool, RanksLostError
from surgery.verify.shrink import shrink
from surgery.verify.staging import staged_through_host
from surgery.verify.sweep import Row, read_rows, sweep
from surgery.verify.trial import EXACT, FAILED, GATHERED, REFUSED, UNRUNNABLE, WRONG, Outcome, try_model, unanswered
from surgery.verify.verify import Verification
from tests.proof import assert_exact, prove

needs_fork = pytest.mark.skipif(not can_fork(), reason="processes that have computed are forked on Linux without a GPU")

LLAMA = Architecture("causal-lm", "LlamaForCausalLM", "llama")
MISTRAL = Architecture("causal-lm", "MistralForCausalLM", "mistral")  # grouped key heads


@pytest.fixture(scope="module")
def alone() -> Iterator[RankPool]:
    """One process without a process group, which may fork ranks."""
    pool = RankPool(1, has_pools=True)
    yield pool
    pool.close()


def _try(architecture: Architecture, kinds: list[str]) -> list[Outcome]:
    config = architecture.as_decoder(shrink(architecture.default_config()))
    return list(try_model(architecture.make, config, 2, kinds))


def _try_with_a_lost_gather(architecture: Architecture, kinds: list[str]) -> list[Outcome]:
    """A mistake as a rule could make it: the loss is this rank's addend alone."""
    with mock.patch.object(collectives, "all_reduce_sum", lambda x, group_name: x * 1):
        return _try(architecture, kinds)


def _try_all(architecture: Architecture) -> tuple[list[Outcome], int]:
    with mock.patch("surgery.programs.programs.capture", wraps=capture) as captured:
        return _try(architecture, list(KINDS)), captured.call_count


def test_every_kind_of_input_on_a_plain_decoder(pair: RankPool) -> None:
    outcomes, captures = pair.run(_try_all, LLAMA)[0]
    assert [outcome.kind for outcome in outcomes] == list(KINDS)
    assert {outcome.verdict for outcome in outcomes} == {EXACT}
    assert captures == 3  # ids and labels; with position_ids; with an attention_mask


def _try_forked(architecture: Architecture, kinds: list[str], *, is_gather_lost: bool = False) -> list[Outcome]:
    """Four ranks that would fail to capture; with a mistake, if asked for, that all of them inherit."""
    config = architecture.as_decoder(shrink(architecture.default_config(), 4))
    here = os.getpid()

    def capture_here(*args: Any) -> Any:
        assert os.getpid() == here, "a rank captured"
        return capture(*args)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("surgery.programs.programs.capture", capture_here))
        if is_gather_lost:
            stack.enter_context(mock.patch.object(collectives, "all_reduce_sum", lambda x, group_name: x * 1))
        return list(try_model(architecture.make, config, 4, kinds, run=run_forked))


@needs_fork
@pytest.mark.parametrize("architecture", [LLAMA, MISTRAL], ids=lambda architecture: architecture.model_type)
def test_forked_ranks_share_a_capture(alone: RankPool, architecture: Architecture) -> None:
    (outcomes,) = alone.run(_try_forked, architecture, list(KINDS))
    assert {outcome.verdict for outcome in outcomes} == {EXACT}
    assert all(outcome.error > 0 for outcome in outcomes), "nothing was summed in another order"


@needs_fork
def test_forked_ranks_exchange(alone: RankPool) -> None:
    ((outcome,),) = alone.run(_try_forked, LLAMA, ["uneven"], is_gather_lost=True)
    assert outcome.verdict == WRONG and outcome.error > 0.1


def _try_with(run: Callable[[int], dict[str, float]]) -> Outcome:
    """The outcome on two forked ranks, of which each has `run(rank)` for errors."""
    own = mock.patch("surgery.verify.forked.run_sharded", lambda model, *_: run(model.surgery.axis.rank))
    with own, mock.patch.object(ranks, "GRACE_S", 1):
        (outcome,) = try_model(LLAMA.make, shrink(LLAMA.default_config()), 2, ["plain"], run=run_forked)
    return outcome


def _nan_on_the_last(rank: int) -> dict[str, float]:
    return {"loss": float("nan") if rank else 0.0}


def _refuse(rank: int) -> dict[str, float]:
    raise CaptureError("no")


def _fail_on_the_last(rank: int) -> dict[str, float]:
    if rank:
        raise KeyError("no such key")
    dist.barrier()
    return {}


def _die_on_the_last(rank: int) -> dict[str, float]:
    if rank:
        os._exit(1)
    dist.barrier()
    return {}


@needs_fork
@pytest.mark.parametrize(
    ("run", "verdict", "reason"),
    [
        (_nan_on_the_last, WRONG, ""),
        (_refuse, REFUSED, "no"),
        (_fail_on_the_last, FAILED, "rank 1: KeyError: 'no such key'"),
        (_die_on_the_last, FAILED, "RanksLostError: rank 1 died"),
    ],
)
def test_one_forked_rank_decides(alone: RankPool, run: Any, verdict: str, reason: str) -> None:
    (outcome,) = alone.run(_try_with, run)
    assert outcome.verdict == verdict and reason in outcome.reason


def test_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("surgery.verify.verify.KINDS", ["uneven"]):
        assert main(["verify", "llama", "--sp-size", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcomes"][0]["verdict"] == EXACT


def test_kinds_of_a_family_pass_the_same_arguments() -> None:
    config: Any = shrink(AutoConfig.for_model("llama"))
    for family in find_families(KINDS):
        assert len({frozenset(make_batch(kind, config)) for kind in family}) == 1
    assert sorted(itertools.chain(*find_families(KINDS))) == sorted(KINDS)


def test_a_wrong_loss_is_found_out(pair: RankPool) -> None:
    (outcome,) = pair.run(_try_with_a_lost_gather, LLAMA, ["uneven"])[0]
    assert outcome.verdict == WRONG
    assert outcome.error is not None
    assert outcome.error > 0.1


def _try_with_no_tolerance(architecture: Architecture, kinds: list[str]) -> list[Outcome]:
    with mock.patch.dict(TOLERANCE, {torch.float32: 0.0}):
        return _try(architecture, kinds)


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture("causal-lm", "MixtralForCausalLM", "mixtral"),
        Architecture("causal-lm", "DiffLlamaForCausalLM", "diffllama"),  # asks for sums in float32
    ],
    ids=lambda architecture: architecture.model_type,
)
def test_rounding_is_told_from_errors(pair: RankPool, architecture: Architecture) -> None:
    (outcome,) = pair.run(_try_with_no_tolerance, architecture, ["uneven"])[0]
    assert outcome.verdict == EXACT and "float32 rounding" in outcome.reason
    assert outcome.error is not None and outcome.error < TOLERANCE[torch.float64]


def test_what_is_gathered_is_named(pair: RankPool) -> None:
    (outcome,) = pair.run(_try, Architecture("causal-lm", "BloomForCausalLM", "bloom"), ["uneven"])[0]
    assert outcome.verdict == GATHERED
    assert "bmm" in outcome.cost


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([EXACT, GATHERED], 0),
        ([EXACT, UNRUNNABLE], 0),
        ([EXACT, REFUSED], 1),
        ([UNRUNNABLE], 1),
        ([WRONG, REFUSED, EXACT], 3),
        ([EXACT, FAILED], 3),
    ],
)
def test_exit_codes(verdicts: list[str], code: int) -> None:
    outcomes = tuple(Outcome("plain", verdict) for verdict in verdicts)
    assert Verification("LlamaForCausalLM", 2, 2, outcomes).exit_code == code


def test_only_our_own_errors_are_refusals() -> None:
    assert unanswered("plain", CaptureError("no")).verdict == REFUSED
    assert unanswered("plain", RuntimeError("no")).verdict == FAILED
    assert unanswered("plain", RanksLostError("rank 1 died")).verdict == FAILED


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with mock.patch("surgery.verify.verify.KINDS", ["uneven"]):
        assert main(["verify", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "LlamaForCausalLM"
    assert facts["outcomes"][0]["verdict"] == EXACT


def test_refused_for_a_model_without_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "vit"]) == 1
    assert "language model" in capsys.readouterr().err


def test_batches_keep_away_from_special_tokens() -> None:
    config: Any = shrink(AutoConfig.for_model("bert", pad_token_id=25))
    for kind in KINDS:
        assert not (make_batch(kind, config)["input_ids"] == 25).any()
    assert torch.equal(make_batch("packed", config)["position_ids"][0, :13], torch.tensor([*range(12), 0]))


def test_catalog_has_every_class_once() -> None:
    names = [architecture.class_name for architecture in list_architectures()]
    assert len(names) == len(set(names)) > 200
    assert LLAMA in list_architectures()


@pytest.mark.parametrize(
    ("model_type", "facts", "class_name"),
    [
        ("llama", {}, "LlamaForCausalLM"),
        ("t5", {}, "T5ForConditionalGeneration"),
        ("bart", {}, "BartForConditionalGeneration"),
        ("bart", {"architectures": ["BartForCausalLM"]}, "BartForCausalLM"),
        ("bert", {}, "BertForMaskedLM"),
        ("bert", {"architectures": ["BertModel"]}, "BertForMaskedLM"),
        ("bert", {"is_decoder": True}, "BertLMHeadModel"),
    ],
)
def test_the_class_that_has_all_of_a_configurations_parts(
    model_type: str, facts: dict[str, Any], class_name: str
) -> None:
    assert find_architecture(AutoConfig.for_model(model_type, **facts)).class_name == class_name


def test_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "coverage.jsonl"
    done = Row(LLAMA, (Outcome("uneven", EXACT, error=1e-7),))
    path.write_text(json.dumps(done.to_dict()) + "\n")
    unbuildable = Architecture("masked-lm", "ViTModel", "vit")
    (row,) = sweep(path, [LLAMA, unbuildable], 2, ["uneven"])
    assert row.architecture == unbuildable
    assert row.outcomes[0].verdict == UNRUNNABLE
    assert done in read_rows(path)
    assert len(read_rows(path)) == 2


def test_sweep_tries_again_on_another_device(tmp_path: Path) -> None:
    path = tmp_path / "coverage.jsonl"
    path.write_text(json.dumps(Row(LLAMA, (Outcome("uneven", EXACT),), device="elsewhere").to_dict()) + "\n")
    (row,) = sweep(path, [LLAMA], 2, ["uneven"])
    assert row.device == "cpu" and "Computed on: cpu." in coverage_page(read_rows(path), 2)


def _through_the_host() -> tuple[dict[str, float], bool]:
    """The errors with collectives staged, and whether they are as before afterwards."""
    before = vars(collectives)["all_reduce_sum"]
    with staged_through_host():
        assert vars(collectives)["all_reduce_sum"] is not before
        errors = prove("llama", 2)
    return errors, vars(collectives)["all_reduce_sum"] is before


def test_exchange_through_the_host(pair: RankPool) -> None:
    for errors, is_as_before in pair.run(_through_the_host):
        assert_exact([errors])
        assert is_as_before


def test_page_counts_and_groups() -> None:
    rows = [
        Row(LLAMA, (Outcome("plain", EXACT, error=2e-7, where="lm_head.weight"), Outcome("odd", EXACT, error=1e-7))),
        Row(
            Architecture("masked-lm", "A", "a"),
            (Outcome("plain", REFUSED, "Could not guard on data-dependent expression"),),
        ),
        Row(
            Architecture("masked-lm", "B", "b"),
            (Outcome("plain", UNRUNNABLE, "no"), Outcome("odd", GATHERED, cost="fft")),
        ),
    ]
    page = coverage_page(rows, 2)
    assert "| exact | 1 | 33.3% |" in page
    assert "| LlamaForCausalLM | exact | 2.0e-07 | lm_head.weight |  |" in page
    assert "- **the forward branches on values of tensors** (1): A" in page
