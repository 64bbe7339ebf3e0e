"""Reading transformers' mask functions: from nested closures back to the few words that describe a pattern.

    and_masks(sliding_window_overlay(w), causal)                    -> causal, window w
    and_masks(documents(ids), remap(causal, positions))             -> causal, documents ids

transformers composes masks out of closures and hands them over whole. Their names and variables are not public API:
what is not recognised here is `UNKNOWN`, and then the mask is built in full instead. Nothing is guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pattern:
    """A mask that any batch, head and length share, and the document each token belongs to ([B, S] int)."""

    is_causal: bool = False
    window: int | None = None
    documents: Tensor | None = None
    is_remapped: bool = False


UNKNOWN = Pattern()


def read_mask_function(function: Callable[..., Any]) -> Pattern:
    """The pattern that `function(batch, head, query, key) -> bool` draws, or `UNKNOWN`."""
    pattern = _read(function)
    if pattern is None or (pattern.is_remapped and pattern.documents is None):
        return UNKNOWN
    return pattern


def _read(function: Callable[..., Any]) -> Pattern | None:
    reader = READERS.get(f"{function.__module__}.{function.__qualname__}")
    return reader(dict(inspect.getclosurevars(function).nonlocals)) if reader is not None else None


def _read_conjunction(variables: dict[str, Any]) -> Pattern | None:
    result = Pattern()
    for function in variables["mask_functions"]:
        part = _read(function)
        if part is None or (part.documents is not None and result.documents is not None):
            return None
        windows = [w for w in (result.window, part.window) if w is not None]
        result = Pattern(
            result.is_causal or part.is_causal,
            min(windows, default=None),
            part.documents if part.documents is not None else result.documents,
            result.is_remapped or part.is_remapped,
        )
    return result if result.window is None or result.is_causal else None


def _read_remapped(variables: dict[str, Any]) -> Pattern | None:
    """In a document positions rise by one: "behind" and "at most w back" mean the same for positions and indices."""
    inner = _read(variables["mask_function"])
    return replace(inner, is_remapped=True) if inner is not None else None


_MASKS = "transformers.masking_utils."
READERS: dict[str, Callable[[dict[str, Any]], Pattern | None]] = {
    _MASKS + "causal_mask_function": lambda _: Pattern(is_causal=True),
    _MASKS + "bidirectional_mask_function": lambda _: Pattern(),
    _MASKS + "and_masks.<locals>.and_mask": _read_conjunction,
    _MASKS + "sliding_window_overlay.<locals>.inner_mask": lambda v: Pattern(window=v["sliding_window"]),
    _MASKS + "packed_sequence_mask_function.<locals>.inner_mask": lambda v: Pattern(
        documents=v["packed_sequence_mask"]
    ),
    _MASKS + "remap_positions_for_packed_sequence.<locals>.inner_mask": _read_remapped,
}
