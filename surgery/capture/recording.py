"""While a model is traced, attention calls are written down instead of computed.

    ALL_ATTENTION_FUNCTIONS[name](module, q, k, v, mask, **keywords)    ->  surgery::attention and a RecordedCall

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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery.attention import operators
from surgery.attention.recorded import RecordedCall, Recording, Slot
from surgery.capture.recording_masks import documents_found_aside, record_mask
from surgery.errors import CaptureError
from surgery.exchange.own_heads import PER_HEAD, WITHOUT_HEADS
from surgery.private import intercepted_lookup

_registry_lock = threading.RLock()
_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[Recording]:
    """Record the attention calls of `model` instead of computing them."""
    names = attention_implementations(model)
    with _registry_lock:
        recording = Recording(model, {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in names})
        entries: list[tuple[Any, str, Any]] = [(ALL_ATTENTION_FUNCTIONS, n, f) for n, f in recording.functions.items()]
        entries += [(ALL_MASK_ATTENTION_FUNCTIONS, *entry) for entry in ALL_MASK_ATTENTION_FUNCTIONS.items()]
        token = _recording.set(recording)
        try:
            for registry, name, function in entries:
                record = record_attention if registry is ALL_ATTENTION_FUNCTIONS else record_mask
                if function is not None:
                    registry[name] = partial(_recorded, record, name, function)
            with intercepted_lookup(_lookup), documents_found_aside(recording):
                yield recording
        finally:
            _recording.reset(token)
            for registry, name, function in entries:
                if function is not None:
                    del registry[name]
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
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write down one call of a registered attention function and emit one `surgery::attention`."""
    places = list(inspect.signature(function).parameters)[5:]
    kwargs = {**dict(zip(places, args, strict=False)), **kwargs}
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise CaptureError(
            f"the mask of {type(module).__name__} is a {type(attention_mask).__name__}, which a graph for all batches "
            "cannot hold. Expected a tensor, or None. Register a mask function that makes it: docs/backends.md."
        )
    modules = recording.model.named_modules()
    path = next((path for path, other in modules if vars(other) is vars(module)), None)  # torch.export may wrap it
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
