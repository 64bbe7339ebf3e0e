"""Attention calls as small functions, for the passes that deal with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from passes.canonicalize_sizes import CanonicalizeSizes
from passes.insert_conversions import InsertConversions
from passes.locate_attention import LocateAttention
from passes.propagate_placements import PropagatePlacements
from passes.simplify_masks import SimplifyMasks
from surgery.pipeline import Pass
from tests.tracing import trace

LOCATED: tuple[Pass, ...] = (CanonicalizeSizes(), LocateAttention())
CONVERTED: tuple[Pass, ...] = (*LOCATED, SimplifyMasks(), PropagatePlacements(), InsertConversions())
KEYS = "b 4 s 4"


def attend(query: Tensor, key: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """One recorded attention call."""
    output: Tensor = torch.ops.surgery.attention(query, key, key, mask, 0.0, None, is_causal, [], [])
    return output


def describe(x: Tensor, padding: Tensor | None = None, documents: Tensor | None = None, **options: Any) -> Tensor:
    """The mask of a square call over the tokens of x, [B, N, S, H]."""
    given = {"is_causal": True, "window": None, **options}
    sizes = (x.shape[0], x.shape[2], x.shape[2])
    mask: Tensor = torch.ops.surgery.attention_mask(padding, documents, *sizes, **given, device=x.device, lifted=[])
    return mask


def causal(num_heads: int = 8, keys: str = KEYS) -> fx.GraphModule:
    """A causal call, its tokens scaled before and after."""
    return trace(lambda q, k: attend(q * 2, k * 2, is_causal=True) * 2, f"b {num_heads} s 4", keys)
