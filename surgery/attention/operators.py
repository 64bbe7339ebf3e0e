"""Attention and its masks as single graph nodes: the two operators that exist only between capture and lowering.

    surgery::attention        one call, KV heads un-repeated: [B, N, S, H] x [B, Nk, S, H] -> [B, N, S, H]
    surgery::attention_mask   what the call may see, described in O(S), with the shape [B, 1, S, S] it stands for

`surgery/capture/recording.py` puts them into the graph, `passes/lower_attention.py` takes them out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("surgery::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    is_causal: bool,
    extras: Sequence[Tensor],
    sizes: Sequence[int],
    call: int | None = None,
) -> Tensor:
    """`extras` and `sizes` are what else the call is given that varies; `call` is the number of its `RecordedCall`."""
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
    extras: Sequence[Tensor],
    sizes: Sequence[int],
    call: int | None = None,
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
    lifted: Sequence[Tensor],
    reach: int | None = None,
    chunk_size: int | None = None,
    chunk_starts: Tensor | None = None,
    positions: Tensor | None = None,
    blocks: Tensor | None = None,
    drawn: Tensor | None = None,
    dtype: torch.dtype | None = None,
    is_padding: bool = False,
    maker: int | None = None,
) -> Tensor:
    """The words are those of `surgery.masks.Pattern`; `maker` is the number of the `RecordedMask` that draws it.

    `lifted` are the tensors of a function that has no words.
    """
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
    lifted: Sequence[Tensor],
    reach: int | None = None,
    chunk_size: int | None = None,
    chunk_starts: Tensor | None = None,
    positions: Tensor | None = None,
    blocks: Tensor | None = None,
    drawn: Tensor | None = None,
    dtype: torch.dtype | None = None,
    is_padding: bool = False,
    maker: int | None = None,
) -> Tensor:
    shape = (batch_size, key_length) if is_padding else (batch_size, 1, query_length, key_length)
    return torch.empty(shape, dtype=torch.bool if dtype is None else dtype, device=device)


ATTENTION = torch.ops.surgery.attention.default
MASK = torch.ops.surgery.attention_mask.default
