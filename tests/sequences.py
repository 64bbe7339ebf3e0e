"""Batches for every kind of model head, their rows padded on either side, and of two lengths for encoder-decoders."""

from __future__ import annotations

from typing import Any

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

from surgery.verify.comparison import compare
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
