"""Encoder-decoders, encoders and heads of every kind: exact, with two lengths, padding on both sides, uneven labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
)

from surgery import restore, transform
from surgery.comparison import compare
from surgery.ranks import RankPool
from tests.counting import CollectiveCounter
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.zoo import VOCAB_SIZE, make_batch, make_model

B, S, T = 3, 30, 23
PER_SEQUENCE = torch.tensor([1, 0, 1])


def padding(length: int, *counts: int) -> Tensor:
    """[B, length] with so many zeros at the end of each row, or at the front where the count is negative."""
    mask = torch.ones(B, length, dtype=torch.long)
    for row, count in enumerate(counts):
        mask[row, slice(0, -count) if count < 0 else slice(length - count, length)] = 0
    return mask


def padded(length: int = S) -> dict[str, Tensor]:
    """Ids of which the second row is padded in front, and the third behind."""
    return {"input_ids": make_batch(B, length)["input_ids"], "attention_mask": padding(length, 0, -5, 11)}


def of_tokens(length: int = S, num_labels: int = VOCAB_SIZE) -> Tensor:
    labels = make_batch(B, length, seed=2)["labels"]
    return torch.where(labels >= 0, labels % num_labels, labels).masked_fill(padding(length, 0, -5, 11) == 0, -100)


def translated() -> dict[str, Tensor]:
    """S tokens into T, whose ids the model makes from the labels; T is padded too."""
    return {**padded(), "labels": of_tokens(T), "decoder_attention_mask": padding(T, 0, 7, 2)}


def given() -> dict[str, Tensor]:
    """The decoder's ids given, beside its labels."""
    return {**padded(), "decoder_input_ids": make_batch(B, T, seed=3)["input_ids"], "labels": of_tokens(T)}


BATCHES: dict[Any, Any] = {
    AutoModel: padded,
    AutoModelForCausalLM: lambda: {**padded(), "labels": of_tokens()},
    AutoModelForMaskedLM: lambda: {**padded(), "labels": of_tokens()},
    AutoModelForTokenClassification: lambda: {**padded(), "labels": of_tokens(num_labels=2)},
    AutoModelForSequenceClassification: lambda: {**padded(), "labels": PER_SEQUENCE},
    AutoModelForQuestionAnswering: lambda: {
        **padded(),
        "start_positions": torch.tensor([3, 20, 8]),
        "end_positions": torch.tensor([30, 24, 9]),
    },
    AutoModelForMultipleChoice: lambda: {
        **{name: x.view(B, 2, S // 2) for name, x in padded().items()},
        "labels": PER_SEQUENCE,
    },
    AutoModelForSeq2SeqLM: translated,
    AutoModelForSpeechSeq2Seq: lambda: {
        "input_features": torch.randn(B, 8, 40, generator=torch.Generator().manual_seed(0)),
        "labels": of_tokens(T),
    },
}


def prove_head(auto: Any, name: str, sp_size: int, batch: Any = None, **changes: Any) -> dict[str, float]:
    model = make_model(name, auto=auto, **changes)
    return compare(model, sp_size, BATCHES[auto]() if batch is None else batch)


PAIRS = [(name, sp_size) for name in ("bart", "t5") for sp_size in (2, 4)]


@pytest.mark.parametrize(("name", "sp_size"), sampled(PAIRS, {("bart", 4), ("t5", 4)}))
def test_encoder_decoder(ranks: RankPool, name: str, sp_size: int) -> None:
    assert_exact(ranks.run(prove_head, AutoModelForSeq2SeqLM, name, sp_size))


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


def test_cross_attention_sends_queries_and_keys_apart(ranks: RankPool) -> None:
    """Nothing is gathered, and no rank sends a token's head twice: the first all-gather compares the ranks' batches."""
    num_layers, heads_bytes = 2, 8 * 8 * 4  # of one token: 8 heads of 8 numbers
    source, target = B * 32 // 4 * heads_bytes, B * 24 // 4 * heads_bytes
    encoder, decoder, across = [3 * source, source], [3 * target, target], [target, 2 * source, target]
    expected = sorted((encoder + decoder + across) * num_layers)
    for forward, sent_forward, backward, sent_backward in ranks.run(_count_collectives):
        assert forward == {"all_gather_into_tensor": 1, "all_to_all_single": 7 * num_layers, "all_reduce": 1}
        assert backward == {"all_to_all_single": 7 * num_layers, "all_reduce": 1}
        assert sent_forward == sent_backward == expected


@pytest.mark.parametrize("name", sampled(["mbart", "pegasus", "switch_transformers"], []))
def test_encoder_decoder_with_given_ids(ranks: RankPool, name: str) -> None:
    assert_exact(ranks.run(prove_head, AutoModelForSeq2SeqLM, name, 4, given()))


def test_equal_lengths_are_told_apart_by_name(ranks: RankPool) -> None:
    batch = {**padded(), "labels": of_tokens(S), "decoder_attention_mask": padding(S, 0, 7, 2)}
    assert_exact(ranks.run(prove_head, AutoModelForSeq2SeqLM, "bart", 4, batch))


def test_sound_is_whole_and_its_text_sharded(ranks: RankPool) -> None:
    assert_exact(ranks.run(prove_head, AutoModelForSpeechSeq2Seq, "whisper", 4))


MASKED = ("albert", "bert", "deberta-v2", "electra", "modernbert", "roberta")


@pytest.mark.parametrize("name", sampled(MASKED, {"modernbert"}))
def test_masked_language_model(ranks: RankPool, name: str) -> None:
    assert_exact(ranks.run(prove_head, AutoModelForMaskedLM, name, 4))


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
def test_head(ranks: RankPool, auto: Any, name: str) -> None:
    assert_exact(ranks.run(prove_head, auto, name, 4, pad_token_id=0))


def test_answers_in_a_text(ranks: RankPool) -> None:
    """In float64: the gradient of the last bias is zero in exact arithmetic, and all noise in float32."""
    results = ranks.run(prove_head, AutoModelForQuestionAnswering, "bert", 4, dtype=torch.float64)
    assert_exact(results, torch.float64)


def test_labels_of_an_example_decide_nothing() -> None:
    model = make_model("bert", auto=AutoModelForSequenceClassification)
    transform(model, 4)
    assert model.config.problem_type is None
