"""Attention functions of a user's own, and flash written out in torch, put into a model and proven."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery.verify.comparison import compare
from tests.flash import CALLS, flash_on_cpu, use
from tests.proof import assert_exact
from tests.zoo import make_model


def prove_flash(name: str, sp_size: int, implementation: str, batch: dict[str, Any], **changes: Any) -> Any:
    """The errors, and which of flash-attn's functions ran."""
    with flash_on_cpu():
        model = use(make_model(name, **changes), implementation)
        errors = compare(model, sp_size, batch)
        return errors, sorted(set(CALLS))


def assert_flash(results: list[Any], function: str) -> None:
    assert_exact([errors for errors, _ in results])
    assert all(calls == [function] for _, calls in results), results


def soft_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax at twice the temperature; a mask is added, and without one documents are read off the positions."""
    groups = module.num_key_value_groups
    assert query.shape[1] == groups * key.shape[1], "local heads"
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling / 2
    if attention_mask is None:
        assert position_ids is not None and position_ids.shape[1] == query.shape[2], "whole positions"
        starts = torch.arange(query.shape[2]) - position_ids
        seen = (starts[:, :, None] == starts[:, None]) & torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
    else:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def soft_mask(dtype: torch.dtype, **kwargs: Any) -> Tensor:
    """A mask function of a user's own: hidden tokens are only made unlikely."""
    mask = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    assert mask is not None
    return torch.where(mask, torch.zeros((), dtype=dtype), -3.0)


def sloped_flex(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Flex attention that goes by the index of a head: the k-th head of the model forgets k times as fast."""

    def slope(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(k <= q, score - 0.1 * head * (q - k), float("-inf"))

    return flex_attention(query, key, value, slope, scale=scaling, enable_gqa=True).transpose(1, 2), None


def register_own() -> None:
    AttentionInterface.register("soft", soft_attention)
    AttentionInterface.register("soft_masked", soft_attention)
    AttentionMaskInterface.register("soft_masked", soft_mask)
    AttentionInterface.register("sloped_flex", sloped_flex)


def prove_own(implementation: str, sp_size: int, batch: dict[str, Any], **changes: Any) -> dict[str, float]:
    register_own()
    before = registries()
    errors = compare(make_model("llama", attn_implementation=implementation, **changes), sp_size, batch)
    assert registries() == before
    return errors


def registries() -> list[dict[str, Any]]:
    """All that is registered, and in which of an interface's two tables."""
    interfaces = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return [dict(table) for each in interfaces for table in (each._global_mapping, each._local_mapping)]
