"""Encoder-decoders, encoders and heads of every kind: exact, with two lengths, padding on both sides, uneven labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
)

from surgery import restore, transform
from surgery.verify.comparison import compare
from surgery.verify.ranks import RankPool
from tests.counting import CollectiveCounter
from tests.proof import assert_calls_exact, assert_exact, prove_calls
from tests.sampling import sampled
from tests.sequences import BATCHES, B, S, given, of_tokens, padded, padding, prove_head
from tests.worlds import World
from tests.zoo import make_batch, make_model


@pytest.mark.parametrize("name", sampled(["bart", "t5"], {"t5"}))
def test_encoder_decoder_on_two_ranks(pair: RankPool, name: str) -> None:
    assert_exact(pair.run(prove_head, AutoModelForSeq2SeqLM, name, 2))


@pytest.mark.parametrize("name", sampled(["bart", "t5"], {"bart"}))
def test_encoder_decoder_on_four_ranks(ranks: RankPool, name: str) -> None:
    assert_exact(ranks.run(prove_head, AutoModelForSeq2SeqLM, name, 4))


def _prove_short_targets(num_tokens: int, sp_size: int) -> dict[str, float]:
    batch = {"input_ids": make_batch(3, 21)["input_ids"], "labels": make_batch(3, num_tokens)["input_ids"]}
    return compare(make_model("t5", auto=AutoModelForSeq2SeqLM), sp_size, batch)


@pytest.mark.parametrize("num_tokens", [2, pytest.param(1, marks=pytest.mark.sweep)])
def test_targets_of_one_token_or_two(world: World, num_tokens: int) -> None:
    assert_exact(world.run(_prove_short_targets, num_tokens, world.sp_size))


def _prove_single_sequences() -> dict[str, float]:
    """Of a classifier without a padding token, which takes one sequence at a time: the default example has two."""
    model = make_model("llama", auto=AutoModelForSequenceClassification)
    batch = {"input_ids": make_batch(1, 13)["input_ids"], "labels": torch.tensor([1])}
    return compare(model, 2, batch)


def test_an_example_is_captured_in_place_of_the_default(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_single_sequences))


def _count_collectives() -> tuple[dict[str, int], list[int], dict[str, int], list[int]]:
    """A step of bart with S = 32 and T = 24 on 4 ranks: its collectives and the bytes of its all-to-alls, each way."""
    model = transform(make_model("bart", auto=AutoModelForSeq2SeqLM), 4)
    batch = {"input_ids": make_batch(B, 32)["input_ids"], "labels": make_batch(B, 24)["labels"]}
    with CollectiveCounter() as forward:
        loss = model(**batch).loss
    with CollectiveCounter() as backward:
        loss.backward()
    restore(model)
    sizes = [sorted(counter.sizes_bytes["all_to_all_single"]) for counter in (forward, backward)]
    return dict(forward.calls), sizes[0], dict(backward.calls), sizes[1]


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="bart of 5.17 draws a number a layer, which ranks share")
@pytest.mark.usefixtures("fake_ranks")
def test_cross_attention_sends_queries_and_keys_apart() -> None:
    """Nothing is gathered, and no rank sends a token's head twice: the first all-gather compares the ranks' batches."""
    num_layers, heads_bytes = 1, 8 * 8 * 4  # of one token: 8 heads of 8 numbers
    source, target = B * 32 // 4 * heads_bytes, B * 24 // 4 * heads_bytes
    encoder, decoder, across = [3 * source, source], [3 * target, target], [target, 2 * source, target]
    expected = sorted((encoder + decoder + across) * num_layers)
    forward, sent_forward, backward, sent_backward = _count_collectives()
    assert forward == {"all_gather_into_tensor": 1, "all_to_all_single": 7 * num_layers, "all_reduce": 1}
    assert backward == {"all_to_all_single": 7 * num_layers, "all_reduce": 1}
    assert sent_forward == sent_backward == expected


@pytest.mark.parametrize("name", sampled(["mbart", "pegasus", "switch_transformers"], []))
def test_encoder_decoder_with_given_ids(ranks: RankPool, name: str) -> None:
    assert_exact(ranks.run(prove_head, AutoModelForSeq2SeqLM, name, 4, given()))


def test_equal_lengths_are_told_apart_by_name(world: World) -> None:
    batch = {**padded(), "labels": of_tokens(S), "decoder_attention_mask": padding(S, 0, 7, 2)}
    assert_exact(world.run(prove_head, AutoModelForSeq2SeqLM, "bart", world.sp_size, batch))


def test_sound_is_whole_and_its_text_sharded(world: World) -> None:
    assert_exact(world.run(prove_head, AutoModelForSpeechSeq2Seq, "whisper", world.sp_size))


MASKED = ("albert", "bert", "deberta-v2", "electra", "modernbert", "roberta")


@pytest.mark.parametrize("name", sampled(MASKED, {"modernbert"}))
def test_masked_language_model(world: World, name: str) -> None:
    assert_exact(world.run(prove_head, AutoModelForMaskedLM, name, world.sp_size))


HEADS = [
    (AutoModel, "bert"),
    (AutoModelForMultipleChoice, "bert"),
    (AutoModelForSequenceClassification, "bert"),
    (AutoModelForSequenceClassification, "llama"),
    (AutoModelForSequenceClassification, "modernbert"),
    (AutoModelForTokenClassification, "llama"),
    (AutoModelForTokenClassification, "roberta"),
]


@pytest.mark.parametrize(
    ("auto", "name"), sampled(HEADS, HEADS[:4]), ids=lambda value: getattr(value, "__name__", value)
)
def test_head(world: World, auto: Any, name: str) -> None:
    assert_exact(world.run(prove_head, auto, name, world.sp_size, pad_token_id=0))


def test_answers_in_a_text(world: World) -> None:
    """In float64: the gradient of the last bias is zero in exact arithmetic, and all noise in float32."""
    results = world.run(prove_head, AutoModelForQuestionAnswering, "bert", world.sp_size, dtype=torch.float64)
    assert_exact(results, torch.float64)


NUMBERS = {
    "regression": torch.tensor([0.3, 1.0, 0.1]),
    "regression of several": torch.tensor([[0.3, 1.0], [0.1, 0.4], [1.0, 0.0]]),
    "multi_label_classification": torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]),
}


@pytest.mark.parametrize("problem", sampled(NUMBERS, {"regression of several"}))
def test_numbers_for_each_sequence(world: World, problem: str) -> None:
    batch = {**padded(), "labels": NUMBERS[problem]}
    head = AutoModelForSequenceClassification, "bert", world.sp_size
    assert_exact(world.run(prove_head, *head, batch, **_problem(problem)))


def _problem(problem: str) -> dict[str, Any]:
    labels = NUMBERS[problem]
    return {"problem_type": problem.split()[0], "num_labels": labels.shape[1] if labels.ndim == 2 else 1}


def _prove_default_example(auto: Any, name: str, dtype: torch.dtype, problem: str | None) -> Any:
    """The errors of a step on the program that `transform` captures when it is shown no batch."""
    batch = {name: value for name, value in BATCHES[auto]().items() if not name.endswith("attention_mask")}
    changes: dict[str, Any] = {}
    if problem is not None:
        changes, batch["labels"] = _problem(problem), NUMBERS[problem]
    model = make_model(name, auto=auto, dtype=dtype, pad_token_id=0, **changes)
    return prove_calls(model, 2, [(lambda model: None, batch)], example=None)


EXAMPLES = [
    (AutoModel, "bert", None),
    (AutoModelForMaskedLM, "roberta", None),
    (AutoModelForMultipleChoice, "bert", None),
    (AutoModelForQuestionAnswering, "bert", None),
    (AutoModelForSeq2SeqLM, "bart", None),
    (AutoModelForSequenceClassification, "llama", None),
    *((AutoModelForSequenceClassification, "bert", problem) for problem in NUMBERS),
    (AutoModelForSpeechSeq2Seq, "whisper", None),
    (AutoModelForTokenClassification, "bert", None),
]


@pytest.mark.parametrize(
    ("auto", "name", "problem"),
    sampled(EXAMPLES, [*EXAMPLES[:4], EXAMPLES[5], EXAMPLES[6]]),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_default_example_is_a_training_step(pair: RankPool, auto: Any, name: str, problem: str | None) -> None:
    """A step like it is not captured again."""
    dtype = torch.float64 if auto is AutoModelForQuestionAnswering else torch.float32  # as above
    results = pair.run(_prove_default_example, auto, name, dtype, problem)
    assert_calls_exact(results, num_programs=1, dtype=dtype)


def test_labels_of_an_example_decide_nothing() -> None:
    model = make_model("bert", auto=AutoModelForSequenceClassification)
    transform(model, 4)
    assert model.config.problem_type is None
