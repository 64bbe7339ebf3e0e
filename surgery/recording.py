"""While a model is traced, attention calls and masks are written down instead of computed.

    ALL_ATTENTION_FUNCTIONS[name](module, q, k, v, mask, **keywords)    ->  surgery::attention and a RecordedCall
    ALL_MASK_ATTENTION_FUNCTIONS[name](B, S, S, mask_function=f, ...)   ->  surgery::attention_mask and a RecordedMask

Everything registered under a name the model asks for is recorded, whoever wrote it, so that it can be called for real
when the graph runs; and under that name, so that the model's own branches on it still work. The registries are restored
afterwards, and other threads never see the stand-ins.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery import attention as operators
from surgery.closures import LiftedFunction, UnliftableError, lift
from surgery.errors import CaptureError
from surgery.masks import UNKNOWN, MaskFunction, Pattern, read_mask_function
from surgery.own_heads import PER_HEAD, WITHOUT_HEADS
from surgery.private import intercepted_lookup

DOCUMENT_ENDS = "cu_seq_lens_q"
BLIND_TO_DOCUMENT_ENDS = (sdpa_attention_forward, flex_attention_forward)
"""Attention functions that do not read cu_seq_lens_*, nor does eager attention: they become documents of the mask."""
TENSOR_MASKS = (sdpa_mask, eager_mask, flash_attention_mask)
"""Mask functions that make a tensor of a known shape, so that a model may compute with it."""


LATER_WORDS = ("reach", "chunk_size", "chunk_starts", "positions", "blocks", "drawn")


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A registered attention function, and what one call of it was given.

    `leaves` are the keywords' values in the order of `spec`, with `Slot`s where tensors and sizes are filled in.
    """

    implementation: str
    function: Callable[..., Any]
    module_path: str
    num_heads: int
    num_kv_heads: int
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @property
    def reads_document_ends(self) -> bool:
        """Whether cu_seq_lens_* reach something that may heed them."""
        return reads_document_ends(self.implementation, self.function)

    def keywords(self, tensors: Any, sizes: Any) -> dict[str, Any]:
        """The keywords of the call, with these tensors and sizes in their places."""
        given = {"tensor": tensors, "size": sizes}
        filled = [given[leaf.kind][leaf.index] if isinstance(leaf, Slot) else leaf for leaf in self.leaves]
        keywords: dict[str, Any] = pytree.tree_unflatten(filled, self.spec)
        return keywords


def reads_document_ends(implementation: str, function: Callable[..., Any] | None) -> bool:
    return implementation != "eager" and function not in BLIND_TO_DOCUMENT_ENDS


@dataclass(frozen=True)
class Slot:
    """The place of the `index`-th tensor, or size, of a call."""

    kind: str
    index: int


@dataclass(frozen=True, eq=False)
class RecordedMask:
    """A registered mask function, and the keywords it was given besides the sizes and the pattern.

    `lifted` is a mask function of the model's own, its tensors taken out.
    """

    implementation: str
    function: Callable[..., Any]
    keywords: dict[str, Any]
    lifted: LiftedFunction | None = None


@dataclass
class Recording:
    """What is written down of one trace: calls and masks by number.

    `functions` are the registered attention functions by name, `tensors` the arguments of the model.
    """

    model: nn.Module
    functions: dict[str, Callable[..., Any] | None]
    calls: list[RecordedCall] = field(default_factory=list)
    masks: list[RecordedMask] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


_registry_lock = threading.RLock()
_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[Recording]:
    """Record the attention calls of `model` instead of computing them."""
    names = attention_implementations(model)
    with _registry_lock:
        recording = Recording(model, {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in names})
        entries = [(r, n, r.get(n)) for r in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS) for n in names]
        token = _recording.set(recording)
        try:
            for registry, name, function in entries:
                record = record_attention if registry is ALL_ATTENTION_FUNCTIONS else record_mask
                if function is not None:
                    registry[name] = partial(_recorded, record, name, function)
            with intercepted_lookup(_lookup):
                yield recording
        finally:
            _recording.reset(token)
            for registry, name, function in entries:
                if function is not None:
                    del registry[name]  # type: ignore[no-untyped-call]
                    if registry.get(name) is not function:
                        registry[name] = function


def attention_implementations(model: nn.Module) -> set[str]:
    """The names under which `model` and its parts look up their attention function."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    names = {getattr(config, "_attn_implementation", None) for config in configs}
    return {name for name in names if isinstance(name, str)} or {"sdpa"}


def _lookup(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What a model gets that looks up `function`: eager attention is the model's own, and in no registry."""
    is_recorded = isinstance(function, partial) and function.func is _recorded
    return function if is_recorded else partial(_recorded, record_attention, name, function)


def _recorded(record: Callable[..., Any], name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    recording = _recording.get()
    return function(*args, **kwargs) if recording is None else record(recording, name, function, *args, **kwargs)


def record_attention(
    recording: Recording,
    name: str,
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write down one call of a registered attention function and emit one `surgery::attention`."""
    places = list(inspect.signature(function).parameters)[5:]
    kwargs = {**dict(zip(places, args, strict=False)), **kwargs}
    path = next((path for path, other in recording.model.named_modules() if other is module), None)
    if path is None or query.ndim != 4 or key.ndim != 4:
        raise CaptureError(
            f"{type(module).__name__} calls its attention with a query of shape {tuple(query.shape)}. Expected "
            "[B, N, S, H], and a module that is part of the model. Use an architecture that does so."
        )
    leaves, tensors, sizes, spec = _flatten(kwargs)
    num_heads, num_kv_heads = int(query.shape[1]), int(key.shape[1])
    _refuse_strange_heads(path, kwargs, (num_heads, num_kv_heads))
    recording.calls.append(RecordedCall(name, function, path, num_heads, num_kv_heads, leaves, spec))
    dropout, scale, is_causal = (kwargs.get(word) for word in ("dropout", "scaling", "is_causal"))
    output = operators.attention(
        query,
        key,
        value,
        attention_mask,
        float(dropout or 0.0),
        float(scale) if isinstance(scale, int | float) else None,
        bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        tensors,
        sizes,
        len(recording.calls) - 1,
    )
    return output.transpose(1, 2).contiguous(), None


def _flatten(kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[Tensor], list[Any], pytree.TreeSpec]:
    """The keywords with slots for what varies, the tensors and sizes that fill them, and how they are nested."""
    values, spec = pytree.tree_flatten(kwargs)
    tensors = [value for value in values if isinstance(value, Tensor)]
    sizes = [value for value in values if isinstance(value, torch.SymInt)]
    slots = iter([Slot("tensor", index) for index in range(len(tensors))])
    others = iter([Slot("size", index) for index in range(len(sizes))])
    leaves = [
        next(slots) if isinstance(value, Tensor) else next(others) if isinstance(value, torch.SymInt) else value
        for value in values
    ]
    return tuple(leaves), tensors, sizes, spec


def _refuse_strange_heads(path: str, kwargs: dict[str, Any], counts: tuple[int, int]) -> None:
    """Refuse a tensor that may have an entry for each head, unless it is known in which dimension."""
    for name, given in kwargs.items():
        if name in PER_HEAD or name in WITHOUT_HEADS:
            continue
        for value in pytree.tree_leaves(given):
            sizes = [size for size in value.shape if isinstance(size, int)] if isinstance(value, Tensor) else []
            if any(size in counts and size > 1 for size in sizes):
                raise CaptureError(
                    f"the attention call at {path} passes {name} of shape {tuple(value.shape)}, which may have an "
                    f"entry for each of {counts[0]} heads. Expected tensors for all heads alike, or one of "
                    f"{', '.join(PER_HEAD)}. Use an architecture or an attention implementation without it."
                )


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
    is_flash = function is flash_attention_mask
    pattern = Pattern() if is_flash else _pattern(mask_function, batch_size, q_length, kv_length, device, kwargs)
    is_read = reads_document_ends(name, recording.functions[name])
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
