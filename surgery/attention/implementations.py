"""What attention calls are lowered to: a function of this rank's heads.

    implementation(q [B, N/P, S, H], k, v [B, Nk/P, S, H], mask, ...) -> [B, N/P, S, H]

`registered` calls the very function that the model asked for. `sdpa` is torch's own, for models that call it by
themselves and in place of transformers' wrapper, which would copy the output once more before it is packed;
`written_out` is for what that wrapper refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from surgery.attention.recorded import RecordedCall
from surgery.axis import Axis, first_token
from surgery.errors import CaptureError
from surgery.exchange.own_heads import HeadView, OwnHeads, cut_run
from surgery.private import flex_heads_from

Implementation = Callable[..., Tensor]
TRUSTED_PACKAGE = "transformers."
LENGTHS = ("max_length_q", "max_length_k")
BROADCASTS_BY_FORMULA = torch.__version__ < "2.14"


def registered(call: RecordedCall, hidden: dict[str, Any]) -> Implementation:
    """The registered function of `call` on this rank's heads; `hidden` are keywords that a graph cannot hold.

    Where a mask turns out to be None, an `is_causal` that the model worked out from a mask is set right. What a
    function gives to flex attention may go by the index of a head, and sees the one that the head has in the model.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        module: nn.Module,
        keywords: dict[str, Any],
        *,
        is_causal: bool,
        axis: Axis,
    ) -> Tensor:
        if _is_idle(query):
            return without_heads(query, key, value)
        heads = own_heads(call, query.shape[1], key.shape[1], axis)
        given = _with_numbers(heads.cut_keywords({**keywords, **hidden}))
        if mask is None and given.get("is_causal") is not None:
            given["is_causal"] = is_causal
        with _flex_heads(call, heads):
            result = call.function(HeadView(module, heads), query, key, value, heads.cut_mask(mask), **given)
        return _checked(result, query, call).transpose(1, 2)

    attend.__name__ = attend.__qualname__ = getattr(call.function, "__name__", call.implementation)
    return attend


def own_heads(call: RecordedCall, count: int, kv_count: int, axis: Axis) -> OwnHeads:
    """The heads that this rank attends with, of those of `call`."""
    first = first_token(call.num_heads, axis.rank, axis.size) if count != call.num_heads else 0
    return OwnHeads(first, count, kv_count, call.num_heads, call.num_kv_heads)


def _flex_heads(call: RecordedCall, heads: OwnHeads) -> AbstractContextManager[None]:
    """Head indices as in the model, for functions that may call flex attention; of transformers' only its own does."""
    is_transformers_own = call.function is flex_attention_forward
    is_without_flex = call.function.__module__.startswith(TRUSTED_PACKAGE) and not is_transformers_own
    if heads.first == 0 or is_without_flex:
        return nullcontext()
    return flex_heads_from(heads.first, are_scores_own=is_transformers_own)


def _with_numbers(keywords: dict[str, Any]) -> dict[str, Any]:
    """Lengths as the numbers that kernels take; a graph holds them as tensors, so that they may vary."""
    if torch.compiler.is_compiling():
        return keywords
    lengths = {name: keywords[name] for name in LENGTHS if isinstance(keywords.get(name), Tensor)}
    return {**keywords, **{name: int(length) for name, length in lengths.items()}}


def _checked(result: Any, query: Tensor, call: RecordedCall) -> Tensor:
    output = result[0] if isinstance(result, tuple) else result
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2] != query.shape[1]:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CaptureError(
            f"the attention function {call.implementation!r} at {call.module_path} returned {found}. Expected "
            f"[B, S, {query.shape[1]}, H], for as many heads as it was given. Return (output, weights or None)."
        )
    return output


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    *,
    is_causal: bool,
    axis: Axis,
    is_broadcast: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` on this rank's heads: `[B, N/P, S, H]`, keys and values un-repeated.

    As in transformers, grouped heads go to the kernel as they are without a mask, and repeated with one.
    `is_broadcast`: the unsharded model has one key head broadcast, which torch before 2.14 does by its formula, not by
    a kernel. That matters for queries (padding) that a bias of the lowest number keeps from all keys: the kernel for
    CPUs gives them other gradients than torch's own formula does. Once 2.13 is not supported, this can go.
    """
    if _is_idle(query):
        return without_heads(query, key, value)
    num_groups = query.shape[1] // key.shape[1]
    mask = _own_mask(mask, query.shape[1], axis)
    if mask is not None and num_groups > 1:
        key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    has_bias = mask is not None and mask.is_floating_point()
    is_by_formula = is_broadcast and has_bias and BROADCASTS_BY_FORMULA
    with sdpa_kernel(SDPBackend.MATH) if is_by_formula else nullcontext():
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal and mask is None,
            scale=scale,
            enable_gqa=mask is None and num_groups > 1,
        )


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    *,
    is_causal: bool,
    axis: Axis,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, for what transformers' sdpa refuses or ignores: soft-capped scores and sinks.

    Builds the scores [B, N/P, S, S] of this rank's heads, as the model's own eager attention does for all heads.
    """
    if _is_idle(query):
        return without_heads(query, key, value)
    num_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = _own_mask(mask, query.shape[1], axis)
    scores = _masked(scores, mask, is_causal)
    shares = _softmax_with_sinks(scores, sinks, axis).to(query.dtype)
    return F.dropout(shares, dropout, dropout > 0.0) @ value


@functools.cache
def sdpa_refuses_soft_caps() -> bool:
    """Whether transformers' sdpa raises on them. In 5.17 it leaves them out, and so do we: the numbers are the model's.

    Once no supported version leaves them out, this can go.
    """
    x = torch.zeros(1, 1, 1, 1)
    try:
        sdpa_attention_forward(nn.Module(), x, x, x, None, softcap=1.0)
    except ValueError:
        return True
    return False


def _is_idle(query: Tensor) -> bool:
    """Whether a rank has no query heads, or no rows of one, in [B, heads, rows, H]."""
    return query.shape[1] == 0 or query.shape[2] == 0


def without_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a rank attends to that has no heads, or no rows of one: nothing, [B, 0, S, H] or [B, 1, 0, H].

    Gradients pass: other ranks wait for them.
    """
    return query @ key.transpose(2, 3) @ value


def _own_mask(mask: Tensor | None, num_heads: int, axis: Axis) -> Tensor | None:
    """A mask [B, N, S, S] or [B, 1, S, S] as this rank's heads need it; all heads share one of two dims, [S, S]."""
    return mask if mask is None or mask.ndim == 2 else _of_own_heads(mask, 1, num_heads, axis)


def _of_own_heads(x: Tensor, dim: int, num_heads: int, axis: Axis) -> Tensor:
    """What has an entry for each head in `dim` cut to this rank's `num_heads`; what heads share as it is."""
    return cut_run(x, dim, first_token(x.shape[dim], axis.rank, axis.size), num_heads)


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    lowest = torch.finfo(scores.dtype).min
    if mask is None and is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask


def _softmax_with_sinks(scores: Tensor, sinks: Tensor | None, axis: Axis) -> Tensor:
    """Softmax over the keys; `sinks` [N] of all heads take their share of it, those of this rank's heads."""
    if sinks is None:
        return scores.softmax(-1, dtype=_at_least_float32(scores.dtype))
    own = _of_own_heads(sinks, 0, scores.shape[1], axis).view(1, -1, 1, 1)
    whole = torch.cat([scores, own.to(scores.dtype).expand(scores.shape[0], -1, scores.shape[2], -1)], dim=-1)
    return whole.softmax(-1, dtype=_at_least_float32(scores.dtype))[..., :-1]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
