"""Settings of heads, lengths and ranks drawn at random, and attention on them: whole, and by an exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from surgery import restore, transform
from surgery.attention.implementations import sdpa
from surgery.axis import Axis, local_length
from surgery.collectives import shard
from surgery.exchange.heads import exchange_to_heads, exchange_to_sequence
from surgery.verify.simulation import simulated_ranks
from tests.counting import CollectiveCounter
from tests.zoo import make_batch, make_model

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Setting:
    """One attention call over `size` ranks."""

    size: int
    batch_size: int
    length: int
    num_kv_heads: int
    group: int
    head_size: int
    value_head_size: int
    mask: str
    dtype: torch.dtype

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        heads = (self.num_kv_heads * self.group, self.num_kv_heads, self.num_kv_heads)
        sizes = (self.head_size, self.head_size, self.value_head_size)
        query, key, value = (
            torch.randn(self.batch_size, n, self.length, h, dtype=self.dtype, generator=generator).requires_grad_()
            for n, h in zip(heads, sizes, strict=True)
        )
        return query, key, value

    def make_mask(self) -> Tensor | None:
        if self.mask in ("none", "causal"):
            return None
        position = torch.arange(self.length)
        seen = position[:, None] >= position[None, :]
        if self.mask == "window":
            return (seen & (position[None, :] > position[:, None] - 3)).expand(self.batch_size, 1, -1, -1)
        slopes = torch.arange(1, self.num_kv_heads * self.group + 1, dtype=self.dtype)  # one bias for each head
        bias = slopes[:, None, None] * (position[None, :] - position[:, None]) / 8
        return torch.where(seen, bias, -torch.inf).expand(self.batch_size, -1, -1, -1)


def draw_settings(
    size: tuple[int, int], length: tuple[int, int], num_kv_heads: tuple[int, int], group: tuple[int, int]
) -> st.SearchStrategy[Setting]:
    """Settings of ranks, lengths and heads in these ranges, of any mask and dtype."""
    return st.builds(
        Setting,
        size=st.integers(*size),
        batch_size=st.integers(1, 3),
        length=st.integers(*length),
        num_kv_heads=st.integers(*num_kv_heads),
        group=st.integers(*group),
        head_size=st.integers(1, 4),
        value_head_size=st.integers(1, 4),
        mask=st.sampled_from(["none", "causal", "window", "biases"]),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )


def attend_whole(setting: Setting, tokens: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    query, key, value = tokens
    key, value = (x.repeat_interleave(setting.group, dim=1) for x in (key, value))
    is_causal = setting.mask == "causal"
    return F.scaled_dot_product_attention(query, key, value, setting.make_mask(), is_causal=is_causal)


def attend_on_ranks(setting: Setting, tokens: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    def attend(axis: Axis) -> Tensor:
        query, key, value = (shard(x, 2, 1, 1, axis) for x in tokens)
        heads = exchange_to_heads(query, key, value, setting.length, axis)
        output = sdpa(*heads, setting.make_mask(), 0.0, None, is_causal=setting.mask == "causal", axis=axis)
        found = exchange_to_sequence(output, query.shape[1], axis)
        assert found.shape[2] == local_length(setting.length, axis)
        return found

    with simulated_ranks(setting.size) as run:
        return torch.cat(run(attend), dim=2)


Attend = Callable[[Setting, tuple[Tensor, Tensor, Tensor]], Tensor]


def check(setting: Setting, attend: Attend = attend_on_ranks) -> None:
    """Output and gradients on ranks are those of the whole call."""
    tokens = setting.tokens()
    expected, found = attend_whole(setting, tokens), attend(setting, tokens)
    tolerance = TOLERANCE[setting.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(expected.shape, dtype=setting.dtype, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        torch.autograd.grad(found, tokens, weights), torch.autograd.grad(expected, tokens, weights), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def with_heads(num_heads: int, num_kv_heads: int) -> dict[str, Any]:
    """Changes to a config that give it so many heads."""
    sizes = {"hidden_size": num_heads * 8, "head_dim": 8}
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, **sizes}


def count_step(num_heads: int, num_kv_heads: int) -> tuple[dict[str, int], list[list[int]]]:
    """Collectives of a step, and the bytes that each all-to-all is given, forward and backward."""
    model = transform(make_model("llama", **with_heads(num_heads, num_kv_heads)), 4)
    batch = make_batch(2, 32)
    with CollectiveCounter() as forward:
        loss = model(**batch, num_items_in_batch=7).loss
    with CollectiveCounter() as backward:
        loss.backward()
    restore(model)
    return dict(forward.calls), [counter.sizes_bytes["all_to_all_single"] for counter in (forward, backward)]
