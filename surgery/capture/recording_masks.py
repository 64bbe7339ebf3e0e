"""While a model is traced, masks are described instead of made.

ALL_MASK_ATTENTION_FUNCTIONS[name](B, S, S, mask_function=f, ...)   ->  surgery::attention_mask and a RecordedMask
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, eager_mask, flash_attention_mask, sdpa_mask

from surgery.attention import operators
from surgery.attention.closures import LiftedFunction, UnliftableError, lift
from surgery.attention.masks import (
    UNKNOWN,
    MaskFunction,
    Pattern,
    composes_as_described,
    has_overlay,
    read_mask_function,
    within_documents,
)
from surgery.attention.recorded import (
    DOCUMENT_ENDS,
    TENSOR_MASKS,
    FoundDocuments,
    RecordedMask,
    Recording,
    reads_document_ends,
)
from surgery.errors import CaptureError

LATER_WORDS = ("reach", "chunk_size", "chunk_starts", "positions", "blocks", "drawn")
"""The words of a pattern that `surgery::attention_mask` takes by name."""


@contextmanager
def documents_found_aside(recording: Recording) -> Iterator[None]:
    """While a model is traced, keep packed documents to ourselves: `record_mask` adds them to the mask made next.

    transformers looks whether there are any, and never leaves out a mask that has some; in a trace it cannot look. It
    is told that there are none, so that the mask function hears whether the model lets it leave the mask out. Other
    threads are told the truth. Raises `CaptureError` where no recorded mask follows.
    """
    find, tracing = masking_utils.find_packed_sequence_indices, threading.get_ident()

    def find_aside(position_ids: Tensor) -> Tensor | None:
        documents = find(position_ids)
        if documents is None or threading.get_ident() != tracing:
            return documents
        _refuse_waiting(recording)
        recording.documents = FoundDocuments(documents, position_ids)
        return None

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", find_aside):
        yield
    _refuse_waiting(recording)


def _refuse_waiting(recording: Recording) -> None:
    if recording.documents is not None:
        raise CaptureError(
            "transformers looked for packed documents and made no mask of them. Expected create_causal_mask and its "
            "like to be called for every mask. Pass the mask itself, [B, 1, S, S]."
        )


def _within_found(mask_function: MaskFunction, recording: Recording, sizes: tuple[Any, Any], use_vmap: bool) -> Any:
    """`mask_function` within the documents that were found for it."""
    if recording.documents is None:
        return mask_function
    found, recording.documents = recording.documents, None
    length = found.documents.shape[1]
    if any(size != length for size in sizes):
        raise CaptureError(
            f"packed documents of {length} tokens were found for a mask of {sizes[0]} queries and {sizes[1]} keys. "
            "Expected positions of the tokens that attend. Pass the mask itself, [B, 1, S, S]."
        )
    if use_vmap and has_overlay(mask_function):
        raise CaptureError(
            "the model lays blocks over a mask function of its own, and it cannot be told whether documents go over "
            "them or they over documents. Expected block_sequence_ids or or_mask_function alone. Pass no position_ids."
        )
    if not composes_as_described():
        raise CaptureError(
            f"transformers {transformers.__version__} puts masks of packed documents together otherwise than is known. "
            "Expected a version from 5.17 to 5.24. Pass the mask itself, [B, 1, S, S]."
        )
    return within_documents(mask_function, *found)


def record_mask(
    recording: Recording,
    name: str,
    function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Write down one call of a registered mask function: nothing for a plain pattern, else one attention_mask.

    A pattern without words is drawn in full by transformers itself, and so stays exact.
    """
    if q_offset != 0 or kv_offset != 0:
        raise CaptureError("a mask for tokens that follow a cache was asked for. Expected none in a captured call.")
    mask_function = _within_found(mask_function, recording, (q_length, kv_length), bool(kwargs.get("use_vmap")))
    is_flash = function is flash_attention_mask
    pattern = _pattern(mask_function, batch_size, q_length, kv_length, device, kwargs)
    if is_flash:  # reads nothing but the padding: windows and documents are keywords of the attention call
        has_words = pattern.drawn is None and pattern.function is None
        pattern = Pattern(is_causal=pattern.is_causal if has_words else True)
    is_read = reads_document_ends(name, recording.functions.get(name))
    ends = recording.tensors.get(DOCUMENT_ENDS) if not is_read else None
    if pattern.drawn is not None and ends is None and function in TENSOR_MASKS:
        kwargs["allow_is_causal_skip"] = False
        return function(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
    pattern = _with_documents(pattern, ends, batch_size, q_length)
    if _is_nothing(function, pattern, attention_mask, kwargs):
        return None
    words = vars(pattern)
    tensors: list[Tensor] = []
    lifted = _lifted(pattern.function, tensors)
    recording.masks.append(RecordedMask(name, function, kwargs, lifted))
    return operators.attention_mask(
        attention_mask,
        words["documents"],
        batch_size,
        q_length,
        kv_length,
        pattern.is_causal,
        pattern.window,
        torch.device(device),
        tensors,
        **{word: words[word] for word in LATER_WORDS},
        dtype=kwargs["dtype"] if function is eager_mask else torch.bool,
        is_padding=is_flash,
        maker=len(recording.masks) - 1,
    )


def _is_nothing(function: Any, pattern: Pattern, padding: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the mask function is known to return None for this pattern, which then is left to `is_causal`."""
    if padding is not None or function not in TENSOR_MASKS:
        return False
    if function is flash_attention_mask:
        return True
    may_skip = "allow_is_causal_skip" if pattern.is_causal else "allow_is_bidirectional_skip"
    is_causal_kept = function is eager_mask and pattern.is_causal
    return pattern.is_plain and not is_causal_kept and bool(kwargs.get(may_skip, pattern.is_causal))


def _pattern(
    mask_function: MaskFunction, batch_size: int, q_length: int, kv_length: int, device: Any, kwargs: dict[str, Any]
) -> Pattern:
    pattern = read_mask_function(mask_function)
    if pattern is not UNKNOWN:
        return pattern
    if kwargs.get("use_vmap"):
        return Pattern(function=mask_function)
    sizes = (batch_size, q_length, kv_length)
    return Pattern(drawn=sdpa_mask(*sizes, mask_function=mask_function, allow_is_causal_skip=False, device=device))


def _lifted(function: MaskFunction | None, tensors: list[Tensor]) -> LiftedFunction | None:
    try:
        lifted: LiftedFunction | None = lift(function, tensors)
    except UnliftableError as error:
        raise CaptureError(
            f"the model's own mask function {getattr(function, '__qualname__', function)} closes over a {error}. "
            "Expected tensors, numbers and functions of those. Pass the mask itself, [B, 1, S, S]."
        ) from error
    return lifted


def _with_documents(pattern: Pattern, ends: Tensor | None, batch_size: int, length: int) -> Pattern:
    """The pattern within documents that end where cu_seq_lens_q says, besides those that it has.

    Both numberings only rise along the sequence, so two tokens agree in their sum exactly if they agree in both.
    """
    if ends is None:
        return pattern
    tokens = torch.arange(batch_size * length, device=ends.device)
    documents = torch.bucketize(tokens, ends, right=True).view(batch_size, length)
    if pattern.documents is not None:
        documents = documents + pattern.documents
    return replace(pattern, documents=documents)
