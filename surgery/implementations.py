"""What attention calls are lowered to, and the tensor form of the masks that need one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.collectives import Axis
from surgery.errors import InputError
from surgery.randomness import rank_stream


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
) -> Tensor:
    """`scaled_dot_product_attention` on this rank's heads: `[B, N/P, S, H]`, keys and values un-repeated.

    As in transformers, grouped heads go to the kernel as they are without a mask, and repeated with one.
    """
    num_groups = query.shape[1] // key.shape[1]
    mask = _of_own_heads(mask, query.shape[1], axis)
    if mask is not None and num_groups > 1:
        key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    with _dropout_stream(dropout, axis.rank, query.device):
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


def eager(
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
    """Attention written out, for what no kernel here takes: soft-capped scores (gemma2) and sinks (gpt-oss).

    Builds the scores [B, N/P, S, S] of this rank's heads, as the model's own eager attention does for all heads.
    """
    num_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = _masked(scores, _of_own_heads(mask, query.shape[1], axis), is_causal)
    shares = _softmax_with_sinks(scores, sinks, axis).to(query.dtype)
    with _dropout_stream(dropout, axis.rank, query.device):
        return F.dropout(shares, dropout, dropout > 0.0) @ value


def _of_own_heads(mask: Tensor | None, num_heads: int, axis: Axis) -> Tensor | None:
    """A mask for each head, [B, N, S, S], cut to this rank's; one that heads share, [B, 1, S, S], as it is."""
    if mask is None or mask.shape[1] == 1:
        return mask
    return mask.narrow(1, axis.rank * num_heads, num_heads)


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
    num_heads = scores.shape[1]
    own = sinks.narrow(0, axis.rank * num_heads, num_heads).view(1, -1, 1, 1)
    whole = torch.cat([scores, own.to(scores.dtype).expand(scores.shape[0], -1, scores.shape[2], -1)], dim=-1)
    return whole.softmax(-1, dtype=_at_least_float32(scores.dtype))[..., :-1]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dropout_stream(dropout: float, rank: int, device: torch.device) -> AbstractContextManager[None]:
    if dropout == 0.0:
        return nullcontext()
    if torch.compiler.is_compiling():
        raise InputError(
            f"attention dropout of {dropout} under torch.compile would repeat one pattern on every rank's heads. "
            "Expected config.attention_dropout=0.0 (hidden dropout is fine), or an uncompiled model."
        )
    return rank_stream(rank, device)


def build_mask(
    padding: Tensor | None,
    documents: Tensor | None,
    batch_size: int,
    query_length: int,
    key_length: int,
    is_causal: bool,
    window: int | None,
    device: torch.device,
    may_skip: bool,
) -> Tensor | None:
    """The boolean mask [B, 1, S, S] of a description; True where a query sees a key.

    None, if it `may_skip`, where padding and documents turn out to say nothing: eager code can look, compiled code
    cannot.
    """
    is_square = query_length == key_length or not is_causal
    may_look = may_skip and window is None and is_square and not torch.compiler.is_compiling()
    if may_look and _says_nothing(padding, documents):
        return None
    query = torch.arange(query_length, device=device)[:, None]
    key = torch.arange(key_length, device=device)[None, :]
    mask = key <= query if is_causal else torch.ones_like(key <= query)
    if window is not None:
        mask = mask & (key > query - window)
    mask = mask[None, None]
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    if padding is not None:
        mask = mask & padding[:, None, None, :].bool()
    return mask.expand(batch_size, -1, -1, -1)


def _says_nothing(padding: Tensor | None, documents: Tensor | None) -> bool:
    is_unpadded = padding is None or bool(padding.all())
    return is_unpadded and (documents is None or bool((documents == documents[:, :1]).all()))


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa, "eager": eager}
