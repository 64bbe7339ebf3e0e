"""Reading transformers' mask functions: from nested closures to the few words that describe a pattern, and back.

    and_masks(sliding_window_overlay(w), causal)                    <->  causal, window w
    and_masks(documents(ids), remap(causal, positions))             <->  causal, documents ids
    or_masks(causal, blockwise_overlay(ids))                        <->  causal, blocks ids

transformers composes masks out of closures and hands them over whole. Their names and variables are not public API:
what is not recognised here is `UNKNOWN`, and then the mask is drawn in full instead. Nothing is guessed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, masking_utils

from surgery.threads import in_own_thread

MaskFunction = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Pattern:
    """A mask that all heads share, in words.

    A query sees a key that is not ahead (`is_causal`), less than `window` behind, at most `reach` away, in the same
    chunk of `chunk_size` tokens counted from `chunk_starts` [B], and in the same of the `documents` [B, S]; within a
    document tokens are counted by `positions` [B, S]. Besides, all tokens of one of the `blocks` [B, S], which number
    from 0, see each other. `drawn` [B, 1, S, S] is a mask without words, `function` one that is not drawn yet.
    """

    is_causal: bool = False
    window: int | None = None
    reach: int | None = None
    chunk_size: int | None = None
    chunk_starts: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    blocks: Tensor | None = None
    drawn: Tensor | None = None
    function: MaskFunction | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is causal or nothing, and no more."""
        return all(getattr(self, name) is None for name in BESIDES_CAUSAL)


BESIDES_CAUSAL = tuple(field.name for field in fields(Pattern) if field.name != "is_causal")
"""Named here because Dynamo of torch 2.11 follows no `vars()`."""
UNKNOWN = Pattern()


def read_mask_function(function: MaskFunction) -> Pattern:
    """The pattern that `function(batch, head, query, key) -> bool` draws, or `UNKNOWN`."""
    pattern = _read(function)
    if pattern is None or (pattern.positions is not None and pattern.documents is None):
        return UNKNOWN
    return pattern


def _read(function: MaskFunction) -> Pattern | None:
    reader = READERS.get(_name(function))
    return reader(dict(inspect.getclosurevars(function).nonlocals)) if reader is not None else None


def _name(function: MaskFunction) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _read_conjunction(variables: dict[str, Any]) -> Pattern | None:
    result: Pattern | None = Pattern()
    for function in variables["mask_functions"]:
        part = _read(function)
        result = _both(result, part) if result is not None and part is not None else None
    return result if result is None or result.window is None or result.is_causal else None


def _both(first: Pattern, second: Pattern) -> Pattern | None:
    """What both patterns let through, where that has words: each may say something that the other does not."""
    if first.blocks is not None or second.blocks is not None:
        return None
    windows = [w for w in (first.window, second.window) if w is not None]
    once = ("reach", "chunk_size", "chunk_starts", "documents", "positions")
    if any(getattr(first, name) is not None and getattr(second, name) is not None for name in once):
        return None
    said = {name: getattr(first if getattr(second, name) is None else second, name) for name in once}
    return Pattern(first.is_causal or second.is_causal, min(windows, default=None), **said)


def _read_disjunction(variables: dict[str, Any]) -> Pattern | None:
    parts = [_read(function) for function in variables["mask_functions"]]
    pattern, overlay = parts if len(parts) == 2 else (None, None)
    if pattern is None or overlay is None or pattern.blocks is not None or overlay.blocks is None:
        return None
    return replace(pattern, blocks=overlay.blocks)


def _read_remapped(variables: dict[str, Any]) -> Pattern | None:
    """Within a document positions count the tokens: what the inner pattern says of indices it says of them."""
    inner = _read(variables["mask_function"])
    if inner is None or inner.documents is not None or inner.blocks is not None:
        return None
    return replace(inner, positions=variables["position_ids"])


_MASKS = "transformers.masking_utils."
_OR = _MASKS + "or_masks.<locals>.or_mask"
_OVERLAY = _MASKS + "blockwise_overlay.<locals>.inner_mask"
READERS: dict[str, Callable[[dict[str, Any]], Pattern | None]] = {
    _MASKS + "causal_mask_function": lambda _: Pattern(is_causal=True),
    _MASKS + "bidirectional_mask_function": lambda _: Pattern(),
    _MASKS + "and_masks.<locals>.and_mask": _read_conjunction,
    _OR: _read_disjunction,
    _MASKS + "sliding_window_overlay.<locals>.inner_mask": lambda v: Pattern(window=v["sliding_window"]),
    _MASKS + "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda v: Pattern(reach=v["sliding_window"]),
    _MASKS + "chunked_overlay.<locals>.inner_mask": lambda v: Pattern(
        chunk_size=v["chunk_size"], chunk_starts=v["left_padding"]
    ),
    _OVERLAY: lambda v: Pattern(blocks=v["block_sequence_ids"]),
    _MASKS + "packed_sequence_mask_function.<locals>.inner_mask": lambda v: Pattern(
        documents=v["packed_sequence_mask"]
    ),
    _MASKS + "remap_positions_for_packed_sequence.<locals>.inner_mask": _read_remapped,
}


def write_mask_function(pattern: Pattern) -> MaskFunction:
    """The mask function that `read_mask_function` would read as `pattern`, made of transformers' own."""
    base: MaskFunction
    if pattern.function is not None:
        base = pattern.function
    elif pattern.drawn is not None:
        base = _look_up(pattern.drawn)
    elif pattern.is_causal:
        base = masking_utils.causal_mask_function
    else:
        base = masking_utils.bidirectional_mask_function
    overlays = []
    if pattern.window is not None:
        overlays.append(masking_utils.sliding_window_overlay(pattern.window))
    if pattern.reach is not None:
        overlays.append(masking_utils.sliding_window_bidirectional_overlay(pattern.reach))
    if pattern.chunk_size is not None:
        assert pattern.chunk_starts is not None
        overlays.append(masking_utils.chunked_overlay(pattern.chunk_size, pattern.chunk_starts))
    function = masking_utils.and_masks(*overlays, base) if overlays else base
    if pattern.positions is not None:
        function = masking_utils.remap_positions_for_packed_sequence(function, pattern.positions)
    if pattern.documents is not None:
        documents = masking_utils.packed_sequence_mask_function(pattern.documents)
        function = masking_utils.and_masks(documents, function)
    if pattern.blocks is not None:
        function = masking_utils.or_masks(function, masking_utils.blockwise_overlay(pattern.blocks))
    return function


COUNTS_WITHIN_DOCUMENTS = hasattr(masking_utils, "remap_positions_for_packed_sequence")
BLOCKS_END_WITH_DOCUMENTS = COUNTS_WITHIN_DOCUMENTS and not hasattr(
    masking_utils, "packed_sequence_compatibility_function"
)


def within_documents(function: MaskFunction, documents: Tensor, positions: Tensor) -> MaskFunction:
    """What `function` lets through within each document, put together as the installed transformers does.

    5.17            tokens keep their numbers, blocks are laid over documents
    5.18 to 5.23    tokens are counted within documents
    5.24            and blocks end where documents do
    """
    if not has_overlay(function):
        return _within_documents(function, documents, positions)
    inner, overlay = inspect.getclosurevars(function).nonlocals["mask_functions"]
    if BLOCKS_END_WITH_DOCUMENTS:
        blocks = inspect.getclosurevars(overlay).nonlocals["block_sequence_ids"]
        cut = torch.where(blocks < 0, blocks, blocks * documents.shape[1] + documents)
        overlay = masking_utils.blockwise_overlay(cut)
    return masking_utils.or_masks(_within_documents(inner, documents, positions), overlay)


def _within_documents(function: MaskFunction, documents: Tensor, positions: Tensor) -> MaskFunction:
    if COUNTS_WITHIN_DOCUMENTS:
        function = masking_utils.remap_positions_for_packed_sequence(function, positions)
    return masking_utils.and_masks(masking_utils.packed_sequence_mask_function(documents), function)


@functools.cache
def composes_as_described() -> bool:
    """Whether the installed transformers draws chunks and blocks of packed documents as `within_documents` does.

    Tried on a few tokens, in a thread of its own, which the modes of a trace do not reach.
    """
    return in_own_thread(_try_composing)


def _try_composing() -> bool:
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    blocks = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, -1, 1, 1, -1, -1]])
    batch_size, length = positions.shape
    chunked = masking_utils.chunked_causal_mask_function(3, torch.zeros(batch_size, dtype=torch.long))
    overlaid = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(blocks))
    documents = masking_utils.find_packed_sequence_indices(positions)
    assert documents is not None
    found: list[Any] = [
        masking_utils.sdpa_mask(
            batch_size,
            length,
            length,
            mask_function=within_documents(function, documents, positions),
            allow_is_causal_skip=False,
        )
        for function in (chunked, overlaid)
    ]
    settings: dict[str, Any] = {"attention_chunk_size": 3, "attn_implementation": "sdpa"}
    call = (LlamaConfig(**settings), torch.zeros(batch_size, length, 1), None, None, positions)
    expected: list[Any] = [
        masking_utils.create_chunked_causal_mask(*call),
        masking_utils.create_causal_mask(*call, block_sequence_ids=blocks),
    ]
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def has_overlay(function: MaskFunction) -> bool:
    """Whether blocks are laid over the rest, as transformers does last."""
    if _name(function) != _OR:
        return False
    return _name(inspect.getclosurevars(function).nonlocals["mask_functions"][-1]) == _OVERLAY


def _look_up(drawn: Tensor) -> MaskFunction:
    def look_up(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return drawn[batch, 0, query, key]

    return look_up
