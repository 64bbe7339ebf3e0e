"""Masks when a graph runs: the registered mask function of the model's implementation is asked for one, once a step.

words in O(S) -> write_mask_function -> ALL_MASK_ATTENTION_FUNCTIONS[name] -> 4-D, 2-D, BlockMask or None
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.masking_utils import and_masks, flex_attention_mask, padding_mask_function, sdpa_mask

from surgery.attention.closures import fill
from surgery.attention.masks import MaskFunction, Pattern, write_mask_function
from surgery.attention.recorded import RecordedMask

TORCH_SDPA = RecordedMask("sdpa", sdpa_mask, {"allow_is_causal_skip": False})
"""What draws a mask that was described by hand, for no implementation in particular."""


def may_be_left_out(record: RecordedMask, is_causal: bool) -> bool:
    """Whether the model lets transformers leave this mask out (None) where nothing is padded."""
    default = ("allow_is_causal_skip", True) if is_causal else ("allow_is_bidirectional_skip", False)
    return bool(record.keywords.get(*default))


def mask_maker(record: RecordedMask) -> Callable[..., Any]:
    """The function of a description's words that makes the mask of `record`'s implementation.

    `may_skip`: it may be None, for the attention calls that take it. `is_asked_for`: a module that is called live takes
    it too, and may ask whether there is one; then it is None where the unsharded model's is.
    """

    def make_mask(
        *,
        batch_size: int,
        query_length: int,
        key_length: int,
        device: torch.device,
        may_skip: bool,
        is_asked_for: bool,
        lifted: list[Tensor],
        padding: Tensor | None = None,
        **words: Any,
    ) -> Any:
        if record.lifted is not None:
            words["function"] = fill(record.lifted, lifted)
        pattern = Pattern(**words)
        if may_skip and _is_one_document(pattern):
            pattern = Pattern(**{**words, "documents": None, "positions": None})
        if is_asked_for:
            is_skipped = may_skip and pattern.documents is None and may_be_left_out(record, pattern.is_causal)
        else:
            is_skipped = may_skip and pattern.is_plain and (query_length == key_length or not pattern.is_causal)
        skips = {
            "allow_is_causal_skip": is_skipped and pattern.is_causal,
            "allow_is_bidirectional_skip": is_skipped and not pattern.is_causal,
        }
        is_own = pattern.function is not None
        given = {name: value for name, value in record.keywords.items() if name != "use_vmap" or is_own}
        return _function(record)(
            batch_size=batch_size,
            q_length=query_length,
            kv_length=key_length,
            q_offset=0,
            kv_offset=0,
            mask_function=write_mask_function(pattern),
            attention_mask=padding,
            device=device,
            **{**given, **skips},
        )

    return make_mask


def _function(record: RecordedMask) -> Callable[..., Any]:
    """The registered function; transformers' for flex asks for a compilation of its own, which Dynamo cannot trace."""
    is_flex = record.function is flex_attention_mask
    return _flex_mask if is_flex and torch.compiler.is_compiling() else record.function


def _flex_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    attention_mask: Tensor | None,
    device: torch.device,
    **kwargs: Any,
) -> BlockMask:
    if attention_mask is not None:
        mask_function = and_masks(mask_function, padding_mask_function(attention_mask))
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device=device)


def _is_one_document(pattern: Pattern) -> bool:
    """Whether the documents turn out to be one: eager code can look, as transformers does, compiled code cannot."""
    if pattern.documents is None or torch.compiler.is_compiling():
        return False
    return bool((pattern.documents == pattern.documents[:, :1]).all())
