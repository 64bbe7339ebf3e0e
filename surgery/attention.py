"""Attention and its masks as single graph nodes: the two operators that exist only between capture and lowering.

    surgery::attention        one call, KV heads un-repeated: [B, N, S, H] x [B, Nk, S, H] -> [B, N, S, H]
    surgery::attention_mask   what the call may see, described in O(S), with the shape [B, 1, S, S] it stands for

While a model is captured, `recorded_attention` puts them in place of the registered functions under the name the model
asked for, so that its own branches on that name still work; the registries are restored afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery.errors import CaptureError
from surgery.masks import UNKNOWN, read_mask_function

IGNORED_KWARGS = frozenset({"position_ids", "cache_position", "output_attentions", "use_cache", "sliding_window"})
TRUSTED_PACKAGE = "transformers."
KNOWN_IMPLEMENTATIONS = (
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "sdpa",
)
MEANINGFUL_KWARGS = frozenset({"cache", "position_bias"})

assert isinstance(ALL_ATTENTION_FUNCTIONS, AttentionInterface)
assert isinstance(ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface)


@torch.library.custom_op("surgery::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    is_causal: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`softcap` bounds scores to (-c, c) by tanh; `sinks` [N] are scores that take a share and bring no value."""
    raise AssertionError("surgery::attention is lowered before a graph runs")


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    is_causal: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("surgery::attention_mask", mutates_args=())
def attention_mask(
    padding: Tensor | None,
    documents: Tensor | None,
    batch_size: int,
    query_length: int,
    key_length: int,
    is_causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    raise AssertionError("surgery::attention_mask is lowered before a graph runs")


@attention_mask.register_fake
def _(
    padding: Tensor | None,
    documents: Tensor | None,
    batch_size: int,
    query_length: int,
    key_length: int,
    is_causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    return torch.empty(batch_size, 1, query_length, key_length, dtype=torch.bool, device=device)


def record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stand in for a registered attention function and emit one `surgery::attention`."""
    _refuse_meaningful(module, kwargs)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
    is_pattern_causal = attention_mask is None and causal
    extras = {name: given for name, given in (("softcap", softcap), ("sinks", s_aux)) if given is not None}
    output = torch.ops.surgery.attention(
        query, key, value, attention_mask, dropout, scaling, is_pattern_causal, **extras
    )
    return output.transpose(1, 2).contiguous(), None


def _refuse_meaningful(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse keywords that change numbers, and eager attention that transformers did not write.

    transformers' sdpa reads none but those named; an eager function may read any. Keywords of the model's call travel
    down to every attention call: they are not the attention's own.
    """
    is_eager = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa") == "eager"
    if is_eager and not type(module).__module__.startswith(TRUSTED_PACKAGE):
        raise CaptureError(
            f"{type(module).__name__} has eager attention of its own, which may be more than softmax(QK^T)V. Expected "
            'attn_implementation="sdpa", or eager attention of transformers. Load the model with sdpa.'
        )
    own = {name for name, given in kwargs.items() if given is not None and given is not False}
    strange = own - IGNORED_KWARGS - _call_arguments.get() if is_eager else own & MEANINGFUL_KWARGS
    if strange:
        raise CaptureError(
            f"{type(module).__name__}: its attention call passes {', '.join(sorted(strange))}, which the graph "
            "would drop. Expected masks, dropout, scale, causality, soft caps or sinks. Use an architecture without it."
        )


def record_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Stand in for transformers' mask functions: nothing for a plain pattern, else one `surgery::attention_mask`.

    A pattern that cannot be described is built in full by transformers itself, and so stays exact.
    """
    pattern = read_mask_function(mask_function)
    if pattern is UNKNOWN or q_offset != 0 or kv_offset != 0:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            device=device,
            use_vmap=kwargs.get("use_vmap", False),
        )
    is_plain = attention_mask is None and pattern.documents is None and pattern.window is None
    if is_plain and (allow_is_causal_skip if pattern.is_causal else allow_is_bidirectional_skip):
        return None
    return torch.ops.surgery.attention_mask(
        attention_mask,
        pattern.documents,
        batch_size,
        q_length,
        kv_length,
        pattern.is_causal,
        pattern.window,
        torch.device(device),
    )


def record_additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The same for eager attention, which adds its mask: 0 where a token is seen, the dtype's lowest elsewhere."""
    kwargs["allow_is_causal_skip"] = False
    mask = record_mask(*args, **kwargs)
    return None if mask is None else torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def _refuse_custom(name: str) -> None:
    """Refuse a function that a user registered: only softmax(QK^T)V is recorded, and it may compute something else."""
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    is_own = function is not None and not function.__module__.startswith(TRUSTED_PACKAGE)
    if is_own or (function is None and name != "eager"):
        raise CaptureError(
            f"attention implementation {name!r} is not transformers' own, and would be replaced by sdpa. "
            f"Expected one of {', '.join(sorted(KNOWN_IMPLEMENTATIONS))}. Load the model with one of them."
        )


_registry_lock = threading.RLock()
_call_arguments: ContextVar[frozenset[str]] = ContextVar("call_arguments", default=frozenset())


@contextmanager
def recorded_attention(implementations: set[str], call_arguments: frozenset[str]) -> Iterator[None]:
    """Record attention calls instead of computing them, for models that ask for one of `implementations`.

    `call_arguments` are the names of the arguments that the model is called with.
    """
    for name in implementations:
        _refuse_custom(name)
    with _registry_lock:
        token = _call_arguments.set(call_arguments)
        entries = [
            (registry, name, registry.get(name))
            for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
            for name in implementations
        ]
        try:
            for name in implementations:
                ALL_ATTENTION_FUNCTIONS[name] = record_attention
                ALL_MASK_ATTENTION_FUNCTIONS[name] = record_additive_mask if name == "eager" else record_mask
            yield
        finally:
            _call_arguments.reset(token)
            for registry, name, entry in entries:
                del registry[name]  # type: ignore[no-untyped-call]
                if registry.get(name) is not entry:
                    registry[name] = entry
