"""transformers' mask functions are read back into words; whatever is strange is built in full instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as masks
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from surgery.attention import record_mask
from surgery.masks import READERS, UNKNOWN, Pattern, read_mask_function
from tests.zoo import make_config

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5]])
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
LENGTH = POSITIONS.shape[1]

causal = masks.causal_mask_function
bidirectional = masks.bidirectional_mask_function
sliding = masks.sliding_window_causal_mask_function(4)
packed = masks.packed_sequence_mask_function(DOCUMENTS)
remapped = masks.remap_positions_for_packed_sequence(causal, POSITIONS)

KNOWN = {
    "causal": (causal, "causal"),
    "bidirectional": (bidirectional, "bidirectional"),
    "sliding": (sliding, "causal, window 4"),
    "packed": (masks.and_masks(causal, packed), "causal, documents"),
    "packed_bidirectional": (packed, "bidirectional, documents"),
    "remapped": (masks.and_masks(packed, remapped), "causal, documents"),
    "sliding_packed": (masks.and_masks(sliding, packed), "causal, window 4, documents"),
    "window_ahead_open": (masks.sliding_window_overlay(4), "bidirectional, window 4"),
    "two_windows": (masks.and_masks(causal, *map(masks.sliding_window_overlay, (5, 3))), "causal, window 3"),
}
STRANGE = {
    "either": masks.or_masks(causal, packed),
    "chunked": masks.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    "blockwise": masks.and_masks(causal, masks.blockwise_overlay(DOCUMENTS)),
    "padding": masks.and_masks(causal, masks.padding_mask_function(torch.ones(2, LENGTH))),
    "offset": masks.add_offsets_to_mask_function(causal, 2, 0),
    "window_both_ways": masks.sliding_window_bidirectional_mask_function(4),
    "documents_twice": masks.and_masks(packed, packed),
    "remapped_alone": remapped,
    "own": lambda batch, head, query, key: query >= key,
    "own_inside": masks.and_masks(causal, lambda batch, head, query, key: query > 2),
    "partly_strange": masks.and_masks(causal, masks.or_masks(causal, packed)),
}


def words(pattern: Pattern) -> str:
    parts = ["causal" if pattern.is_causal else "bidirectional"]
    parts += [f"window {pattern.window}"] if pattern.window is not None else []
    parts += ["documents"] if pattern.documents is not None else []
    return ", ".join(parts)


def drawn(function: Callable[..., Any]) -> Tensor:
    """What transformers itself makes of a mask function, [B, 1, S, S]."""
    mask = masks.sdpa_mask(
        2, LENGTH, LENGTH, mask_function=function, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    assert isinstance(mask, Tensor)
    return mask


def described(pattern: Pattern) -> Tensor:
    """What a pattern says, [B, 1, S, S]."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    seen = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    if pattern.is_causal:
        seen = seen & (key <= query)
    if pattern.window is not None:
        seen = seen & (key > query - pattern.window)
    if pattern.documents is not None:
        seen = seen & (pattern.documents[:, None, :, None] == pattern.documents[:, None, None, :])
    return seen


@pytest.mark.parametrize("name", KNOWN)
def test_recognised(name: str) -> None:
    function, expected = KNOWN[name]
    pattern = read_mask_function(function)
    assert words(pattern) == expected
    assert pattern is not UNKNOWN
    assert torch.equal(described(pattern), drawn(function))


@pytest.mark.parametrize("name", STRANGE)
def test_strange(name: str) -> None:
    assert read_mask_function(STRANGE[name]) is UNKNOWN


def test_every_reader_is_tried() -> None:
    names = {f"{masks.__name__}.{function.__qualname__}" for function in _parts([f for f, _ in KNOWN.values()])}
    assert names == set(READERS)


def _parts(functions: list[Any]) -> Iterator[Any]:
    """The functions, and those that they are composed of."""
    for function in functions:
        yield function
        variables = inspect.getclosurevars(function).nonlocals
        yield from _parts([*variables.get("mask_functions", ()), *filter(None, [variables.get("mask_function")])])


CREATORS: dict[str, tuple[Callable[..., Any], str]] = {
    "causal": (masks.create_causal_mask, "causal, documents"),
    "sliding": (masks.create_sliding_window_causal_mask, "causal, window 4, documents"),
    "bidirectional": (masks.create_bidirectional_mask, "bidirectional"),
}


@pytest.mark.parametrize("name", CREATORS)
def test_what_models_ask_for_is_recognised(name: str) -> None:
    """Through transformers' own entry points: fails when the installed version composes its masks in another way."""
    create, expected = CREATORS[name]
    with recorded_mask_functions() as found:
        create(
            config=make_config("mistral", sliding_window=4, attn_implementation="sdpa"),
            inputs_embeds=torch.zeros(2, LENGTH, 64),
            attention_mask=None,
            **({} if name == "bidirectional" else {"past_key_values": None, "position_ids": POSITIONS}),
        )
    (pattern,) = map(read_mask_function, found)
    assert pattern is not UNKNOWN
    assert words(pattern) == expected
    assert torch.equal(described(pattern), drawn(found[0]))


def test_what_chunked_models_ask_for_is_strange() -> None:
    config = make_config("llama", attn_implementation="sdpa")
    config.attention_chunk_size = 4
    with recorded_mask_functions() as found:
        masks.create_chunked_causal_mask(
            config=config, inputs_embeds=torch.zeros(2, LENGTH, 64), attention_mask=None, past_key_values=None
        )
    assert [read_mask_function(function) for function in found] == [UNKNOWN]


@contextmanager
def recorded_mask_functions() -> Iterator[list[Any]]:
    """The mask functions that reach the registry while the block runs."""
    found: list[Any] = []

    def record(*args: Any, mask_function: Any, **kwargs: Any) -> None:
        found.append(mask_function)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = record
    try:
        yield found
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def test_strange_masks_are_built_in_full() -> None:
    strange = STRANGE["either"]
    mask = record_mask(2, LENGTH, LENGTH, mask_function=strange)
    assert mask is not None
    assert torch.equal(mask, drawn(strange))


def test_plain_masks_are_nothing() -> None:
    assert record_mask(2, LENGTH, LENGTH, mask_function=causal) is None
    assert record_mask(2, LENGTH, LENGTH, mask_function=bidirectional, allow_is_bidirectional_skip=True) is None
