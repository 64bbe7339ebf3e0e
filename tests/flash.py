"""flash-attn's public functions written out in torch, put where transformers loads the kernels: flash runs on a CPU.

    flash_attn_func(q [B, S, N, H], k, v [B, S, Nk, H], ...)                     ->  [B, S, N, H]
    flash_attn_varlen_func(q [T, N, H], k, v [T, Nk, H], cu_seqlens_q, ...)      ->  [T, N, H]

Signatures and meaning as in flash-attn 2.8: causality is aligned to the bottom right, `window_size` (left, right) is
inclusive and -1 means all, `softcap` 0 means none. `learnable_sink` is flash-attn 4's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils

LOADED = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)
CALLS: list[str] = []
"""Which of the two functions ran, for tests that ask."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Tensor:
    assert dropout_p == 0.0 and alibi_slopes is None and not return_attn_probs
    CALLS.append("dense")
    return _attend(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Tensor:
    assert dropout_p == 0.0 and alibi_slopes is None and block_table is None and not return_attn_probs
    assert int(cu_seqlens_q.diff().max()) <= int(max_seqlen_q), "a document longer than announced"
    CALLS.append("varlen")
    outputs = []
    for (start, end), (key_start, key_end) in zip(_runs(cu_seqlens_q), _runs(cu_seqlens_k), strict=True):
        document = (q[None, start:end], k[None, key_start:key_end], v[None, key_start:key_end])
        outputs.append(_attend(*document, softmax_scale, causal, window_size, softcap, learnable_sink)[0])
    return torch.cat(outputs)


def _runs(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(ends.tolist()))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    sink: Tensor | None,
) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    seen = seen & (ahead <= right) if right >= 0 else seen
    seen = seen & (ahead >= -left) if left >= 0 else seen
    scores = scores.masked_fill(~seen, float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    shares = scores.softmax(-1)
    shares = shares[..., : k.shape[2]] if sink is not None else shares
    return (shares @ v).transpose(1, 2)


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Let transformers find the functions above where it looks for flash-attn's."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    CALLS.clear()
    with ExitStack() as stack:
        for name in LOADED:
            stack.enter_context(mock.patch.object(flash_utils, name, None, create=True))
        stack.enter_context(mock.patch.object(flash_utils, "_lazy_imports", return_value=functions))
        yield


def use(model: Any, implementation: str) -> Any:
    """Ask for an implementation without the check that its package is installed."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = implementation
    return model
