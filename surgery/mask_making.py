"""Masks when a graph runs: the registered mask function of the model's implementation is asked for one, once a step.

words in O(S) -> write_mask_function -> ALL_MASK_ATTENTION_FUNCTIONS[name] -> 4-D, 2-D, BlockMask or None
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from surgery.masks import Pattern, write_mask_function
from surgery.recording import RecordedMask

TORCH_SDPA = RecordedMask("sdpa", sdpa_mask, {})
"""What draws a mask that was described by hand, for no implementation in particular."""


def mask_maker(record: RecordedMask) -> Callable[..., Any]:
    """The function of a description's words that makes the mask of `record`'s implementation."""

    def make_mask(
        *,
        batch_size: int,
        query_length: int,
        key_length: int,
        device: torch.device,
        may_skip: bool,
        padding: Tensor | None = None,
        **words: Any,
    ) -> Any:
        pattern = Pattern(**words)
        if may_skip and _is_one_document(pattern):
            pattern = Pattern(**{**words, "documents": None, "positions": None})
        is_skipped = may_skip and pattern.is_plain and (query_length == key_length or not pattern.is_causal)
        skips = {
            "allow_is_causal_skip": is_skipped and pattern.is_causal,
            "allow_is_bidirectional_skip": is_skipped and not pattern.is_causal,
        }
        return record.function(
            batch_size=batch_size,
            q_length=query_length,
            kv_length=key_length,
            q_offset=0,
            kv_offset=0,
            mask_function=write_mask_function(pattern),
            attention_mask=padding,
            device=device,
            **{**record.keywords, **skips},
        )

    return make_mask


def _is_one_document(pattern: Pattern) -> bool:
    """Whether the documents turn out to be one: eager code can look, as transformers does, compiled code cannot."""
    if pattern.documents is None or torch.compiler.is_compiling():
        return False
    return bool((pattern.documents == pattern.documents[:, :1]).all())
