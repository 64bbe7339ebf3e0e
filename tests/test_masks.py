"""transformers' mask functions are read back into words; whatever is strange is built in full instead."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils as masks
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from surgery.attention.masks import (
    COUNTS_WITHIN_DOCUMENTS,
    READERS,
    UNKNOWN,
    Pattern,
    composes_as_described,
    read_mask_function,
    within_documents,
    write_mask_function,
)
from surgery.attention.recorded import Recording
from surgery.capture.recording_masks import record_mask
from tests.zoo import CACHE, make_config

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5]])
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
LENGTH = POSITIONS.shape[1]

causal = masks.causal_mask_function
bidirectional = masks.bidirectional_mask_function
sliding = masks.sliding_window_causal_mask_function(4)
packed = masks.packed_sequence_mask_function(DOCUMENTS)

starts = torch.tensor([0, 2])
chunked = masks.chunked_causal_mask_function(4, starts)
blocks = masks.blockwise_overlay(DOCUMENTS - 1)

KNOWN = {
    "causal": (causal, "causal"),
    "bidirectional": (bidirectional, "bidirectional"),
    "sliding": (sliding, "causal, window 4"),
    "packed": (masks.and_masks(causal, packed), "causal, documents"),
    "packed_bidirectional": (packed, "bidirectional, documents"),
    "sliding_packed": (masks.and_masks(sliding, packed), "causal, window 4, documents"),
    "window_ahead_open": (masks.sliding_window_overlay(4), "bidirectional, window 4"),
    "two_windows": (masks.and_masks(causal, *map(masks.sliding_window_overlay, (5, 3))), "causal, window 3"),
    "window_both_ways": (masks.sliding_window_bidirectional_mask_function(3), "bidirectional, reach 3"),
    "chunked": (chunked, "causal, chunk_size 4, chunk_starts"),
    "blockwise": (masks.or_masks(causal, blocks), "causal, blocks"),
}
STRANGE = {
    "either": masks.or_masks(causal, packed),
    "any_of_three": masks.or_masks(causal, packed, blocks),
    "blocks_cut": masks.and_masks(causal, masks.blockwise_overlay(DOCUMENTS)),
    "blocks_twice": masks.or_masks(masks.or_masks(causal, blocks), blocks),
    "chunks_twice": masks.and_masks(chunked, chunked),
    "padding": masks.and_masks(causal, masks.padding_mask_function(torch.ones(2, LENGTH))),
    "offset": masks.add_offsets_to_mask_function(causal, 2, 0),
    "documents_twice": masks.and_masks(packed, packed),
    "own": lambda batch, head, query, key: query >= key,
    "own_inside": masks.and_masks(causal, lambda batch, head, query, key: query > 2),
    "partly_strange": masks.and_masks(causal, masks.or_masks(causal, packed)),
}
if COUNTS_WITHIN_DOCUMENTS:
    remapped = masks.remap_positions_for_packed_sequence(causal, POSITIONS)
    KNOWN |= {
        "remapped": (masks.and_masks(packed, remapped), "causal, documents, positions"),
        "chunked_packed": (
            masks.and_masks(packed, masks.remap_positions_for_packed_sequence(chunked, POSITIONS)),
            "causal, chunk_size 4, chunk_starts, documents, positions",
        ),
        "blockwise_packed": (
            masks.or_masks(
                masks.and_masks(packed, masks.remap_positions_for_packed_sequence(sliding, POSITIONS)), blocks
            ),
            "causal, window 4, documents, positions, blocks",
        ),
    }
    STRANGE |= {
        "blocks_remapped": masks.and_masks(packed, masks.remap_positions_for_packed_sequence(blocks, POSITIONS)),
        "remapped_alone": remapped,
    }


def words(pattern: Pattern) -> str:
    said = {name: value for name, value in vars(pattern).items() if name != "is_causal" and value is not None}
    parts = [f"{name} {value}" if isinstance(value, int) else name for name, value in said.items()]
    return ", ".join(["causal" if pattern.is_causal else "bidirectional", *parts])


def drawn(function: Callable[..., Any]) -> Tensor:
    """What transformers itself makes of a mask function, [B, 1, S, S]."""
    mask = masks.sdpa_mask(
        2, LENGTH, LENGTH, mask_function=function, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    assert isinstance(mask, Tensor)
    return mask


@pytest.mark.parametrize("name", KNOWN)
def test_recognised(name: str) -> None:
    function, expected = KNOWN[name]
    pattern = read_mask_function(function)
    assert words(pattern) == expected
    assert pattern is not UNKNOWN
    assert torch.equal(drawn(write_mask_function(pattern)), drawn(function))


@pytest.mark.parametrize("name", STRANGE)
def test_strange(name: str) -> None:
    assert read_mask_function(STRANGE[name]) is UNKNOWN


def test_every_reader_is_tried() -> None:
    names = {f"{masks.__name__}.{function.__qualname__}" for function in _parts([f for f, _ in KNOWN.values()])}
    missing = set() if COUNTS_WITHIN_DOCUMENTS else {name for name in READERS if "remap_positions" in name}
    assert names == set(READERS) - missing


def _parts(functions: list[Any]) -> Iterator[Any]:
    """The functions, and those that they are composed of."""
    for function in functions:
        yield function
        variables = inspect.getclosurevars(function).nonlocals
        yield from _parts([*variables.get("mask_functions", ()), *filter(None, [variables.get("mask_function")])])


CREATORS: dict[str, tuple[Callable[..., Any], str]] = {
    "causal": (masks.create_causal_mask, "causal, documents, positions"),
    "sliding": (masks.create_sliding_window_causal_mask, "causal, window 4, documents, positions"),
    "chunked": (
        masks.create_chunked_causal_mask,
        "causal, chunk_size 4, chunk_starts, documents, positions",
    ),
    "bidirectional": (masks.create_bidirectional_mask, "bidirectional"),
}


@pytest.mark.parametrize("name", CREATORS)
def test_what_models_ask_for_is_recognised(name: str) -> None:
    """Through transformers' own entry points: fails when the installed version composes its masks in another way."""
    create, expected = CREATORS[name]
    with recorded_mask_functions() as found:
        create(
            config=make_config("mistral", sliding_window=4, attention_chunk_size=4, attn_implementation="sdpa"),
            inputs_embeds=torch.zeros(2, LENGTH, 64),
            attention_mask=None,
            **({} if name == "bidirectional" else {CACHE: None, "position_ids": POSITIONS}),
        )
    (pattern,) = map(read_mask_function, found)
    assert pattern is not UNKNOWN
    assert words(pattern) == (expected if COUNTS_WITHIN_DOCUMENTS else expected.removesuffix(", positions"))
    assert torch.equal(drawn(write_mask_function(pattern)), drawn(found[0]))


@pytest.mark.parametrize("create", [masks.create_causal_mask, masks.create_sliding_window_causal_mask])
def test_blocks_of_image_tokens_are_recognised(create: Callable[..., Any]) -> None:
    with recorded_mask_functions() as found:
        create(
            config=make_config("mistral", sliding_window=4, attn_implementation="sdpa"),
            inputs_embeds=torch.zeros(2, LENGTH, 64),
            attention_mask=None,
            block_sequence_ids=DOCUMENTS - 1,
            **{CACHE: None},
        )
    (pattern,) = map(read_mask_function, found)
    assert pattern.blocks is not None
    assert torch.equal(drawn(write_mask_function(pattern)), drawn(found[0]))


def test_documents_are_put_together_as_transformers_does() -> None:
    assert composes_as_described()


@pytest.mark.skipif(not COUNTS_WITHIN_DOCUMENTS, reason="transformers 5.17 has no functions for another way")
@pytest.mark.parametrize("name", ["COUNTS_WITHIN_DOCUMENTS", "BLOCKS_END_WITH_DOCUMENTS"])
def test_another_way_to_put_them_together_is_noticed(name: str) -> None:
    module = "surgery.attention.masks"
    with mock.patch(f"{module}.{name}", not getattr(sys.modules[module], name)):
        assert not composes_as_described.__wrapped__()


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


def recorded(function: Callable[..., Any], **options: Any) -> Tensor | None:
    """What stands in for sdpa's mask function while a model is traced."""
    recording = Recording(nn.Module(), {"sdpa": None})
    return record_mask(recording, "sdpa", masks.sdpa_mask, 2, LENGTH, LENGTH, mask_function=function, **options)


def test_strange_masks_are_built_in_full() -> None:
    strange = STRANGE["either"]
    mask = recorded(strange)
    assert mask is not None
    assert torch.equal(mask, drawn(strange))


def test_plain_masks_are_nothing() -> None:
    assert recorded(causal) is None
    assert recorded(bidirectional, allow_is_bidirectional_skip=True) is None


PARTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "or": {"or_mask_function": lambda batch, head, query, key: key < 2},
    "and": {"and_mask_function": lambda batch, head, query, key: key != 1},
    "blocks": {"block_sequence_ids": torch.tensor([[-1, -1, 0, 0, -1, -1]])},
    "or, then blocks": {
        "or_mask_function": lambda batch, head, query, key: key < 1,
        "block_sequence_ids": torch.tensor([[-1, -1, 0, 0, -1, -1]]),
    },
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_documents_go_where_transformers_puts_them(parts: dict[str, Any]) -> None:
    """The function that is composed of documents found aside draws the mask that transformers makes itself."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    asked: list[Any] = []
    config = make_config("llama", attn_implementation="sdpa")
    given: dict[str, Any] = {"inputs_embeds": torch.zeros(1, 6, 8), "attention_mask": None, CACHE: None}
    expected = masks.create_causal_mask(config, **given, position_ids=positions, **parts)

    def ask(**kwargs: Any) -> None:
        asked.append(kwargs["mask_function"])

    with mock.patch.dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, {"sdpa": ask}):
        masks.create_causal_mask(config, **given, position_ids=torch.arange(6)[None], **parts)
    documents = masks.find_packed_sequence_indices(positions)
    assert documents is not None
    function = within_documents(asked[0], documents, positions)
    found = masks.sdpa_mask(1, 6, 6, mask_function=function, allow_is_causal_skip=False, use_vmap=True)
    assert isinstance(found, Tensor) and isinstance(expected, Tensor) and torch.equal(found, expected)
