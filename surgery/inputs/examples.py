"""What a training step passes a model: the call that `transform` captures first.

    causal, masked, token-classifying models    input_ids [B, S], labels [B, S]
    encoder-decoders                            input_ids [B, S], labels [B, T]
    classifiers of sequences                    input_ids [B, S], labels [B]; floats if its config says so
    answers in a text                           input_ids [B, S], start_positions [B], end_positions [B]
    multiple choice                             input_ids [B, choices, S], labels [B]
    a model without a loss                      input_ids [B, S]

What a model's forward takes its parameters say; whether its labels are those of tokens or of sequences, by
transformers' convention, the name of its class.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from surgery.inputs.signature import SAMPLE_INPUTS, SHORTEST

DEFAULT_EXAMPLE_BATCH_SIZE = 2
DEFAULT_EXAMPLE_LENGTH = 64
NUM_CHOICES = 2
SAMPLE_LABELS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
NUMBER_PROBLEMS = ("multi_label_classification", "regression")
SPECTROGRAM = "input_features"


def example_lengths(length: int | None) -> tuple[int, int]:
    """The lengths of the two sequences of an example, which differ so that a trace can tell them apart."""
    first = length or DEFAULT_EXAMPLE_LENGTH
    second = max(3 * first // 4, SHORTEST["t"])
    return first, second if second != first else first + 1


def example_call(model: nn.Module, length: int | None = None) -> dict[str, Tensor]:
    """The call of a training step: ids of `length` tokens, and what the model computes its loss from."""
    parameters = inspect.signature(model.forward).parameters
    first, second = example_lengths(length)
    lead = _lead(model, first)
    names = [name for name in parameters if name in SAMPLE_INPUTS]
    has_decoder = "decoder_input_ids" in parameters
    shapes = {name: _label_shape(model, name, second if has_decoder else first) for name in names}
    if has_decoder and "labels" not in names:
        shapes["decoder_input_ids"] = (DEFAULT_EXAMPLE_BATCH_SIZE, second)
    given = {name: torch.zeros(shape, dtype=torch.long, device=_device(model)) for name, shape in shapes.items()}
    return {**lead, **given, **_numbers(model)}


def _lead(model: nn.Module, length: int) -> dict[str, Tensor]:
    """The ids; for a model of sound, a spectrogram of the one size that it takes."""
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") == SPECTROGRAM and hasattr(config, "max_source_positions"):
        shape = (DEFAULT_EXAMPLE_BATCH_SIZE, config.num_mel_bins, 2 * config.max_source_positions)
        return {SPECTROGRAM: torch.zeros(shape, dtype=next(model.parameters()).dtype, device=_device(model))}
    choices = (NUM_CHOICES,) if _is_named(model, ("ForMultipleChoice",)) else ()
    ids = torch.zeros(DEFAULT_EXAMPLE_BATCH_SIZE, *choices, length, dtype=torch.long, device=_device(model))
    return {"input_ids": ids}


def _label_shape(model: nn.Module, name: str, length: int) -> tuple[int, ...]:
    is_of_tokens = name == "labels" and not _is_named(model, SAMPLE_LABELS)
    return (DEFAULT_EXAMPLE_BATCH_SIZE, length) if is_of_tokens else (DEFAULT_EXAMPLE_BATCH_SIZE,)


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    """The labels of a classifier of sequences whose config says that they are numbers, or that each label has one."""
    config: Any = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem not in NUMBER_PROBLEMS or not _is_named(model, ("ForSequenceClassification",)):
        return {}
    is_single = problem == "regression" and config.num_labels == 1
    shape = (DEFAULT_EXAMPLE_BATCH_SIZE,) if is_single else (DEFAULT_EXAMPLE_BATCH_SIZE, config.num_labels)
    return {"labels": torch.zeros(shape, dtype=next(model.parameters()).dtype, device=_device(model))}


def _is_named(model: nn.Module, endings: tuple[str, ...]) -> bool:
    """Whether the model's class, or one that it derives from, has a name with one of these endings."""
    return any(base.__name__.endswith(endings) for base in type(model).__mro__)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
