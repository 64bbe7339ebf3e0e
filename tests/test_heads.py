"""Any head counts: the plan alone, the exchange with attention on simulated ranks, whole models on real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery import restore, transform
from surgery.axis import Axis, local_length
from surgery.collectives import shard
from surgery.comparison import compare
from surgery.exchange import exchange_to_heads, exchange_to_sequence
from surgery.head_plan import HeadPlan
from surgery.implementations import sdpa
from surgery.ranks import RankPool
from surgery.simulation import simulated_ranks
from tests.counting import CollectiveCounter
from tests.proof import assert_exact, prove
from tests.sampling import sampled
from tests.zoo import make_batch, make_model

COUNTS = [(6, 3), (6, 6), (5, 1), (7, 7), (8, 1), (3, 1), (2, 2), (2, 1), (1, 1), (12, 6), (14, 2)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), COUNTS)
def test_plan(num_heads: int, num_kv_heads: int, size: int) -> None:
    """Every query head has one rank, every rank the keys that its heads need and no others."""
    plan = HeadPlan(num_heads, num_kv_heads, size)
    group = num_heads // num_kv_heads
    assert [head for rank in range(size) for head in plan.heads(rank)] == list(range(num_heads))
    for rank in range(size):
        own, needed = plan.heads(rank), plan.kv_heads(rank)
        assert set(needed) == {head // group for head in own}
        index = plan.kv_index(rank)
        if index is not None:
            assert [needed[i] for i in index] == [head // group for head in own]
        elif own:
            local = len(own) // len(needed)
            assert [needed[i // local] for i in range(len(own))] == [head // group for head in own]
    counts = [len(plan.heads(rank)) for rank in range(size)]
    assert max(counts) - min(counts) <= 1


def test_plan_of_the_docstring() -> None:
    plan = HeadPlan(6, 3, 4)
    assert [list(plan.heads(rank)) for rank in range(4)] == [[0], [1, 2], [3], [4, 5]]
    assert [list(plan.kv_heads(rank)) for rank in range(4)] == [[0], [0, 1], [1], [2]]
    assert not plan.is_even and HeadPlan(8, 2, 4).is_even


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


SETTINGS = draw_settings(size=(1, 5), length=(1, 9), num_kv_heads=(1, 6), group=(1, 4))


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


@given(SETTINGS)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_exchange_and_attention(setting: Setting) -> None:
    check(setting)


@pytest.mark.sweep
@given(SETTINGS)
@settings(max_examples=10_000, deadline=None)
def test_exchange_and_attention_at_length(setting: Setting) -> None:
    check(setting)


def with_heads(num_heads: int, num_kv_heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": num_heads * 8, "head_dim": 8}
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, **sizes}


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), sampled([(6, 3), (7, 7), (5, 1), (3, 3), (2, 1), (1, 1)], {(6, 3), (7, 7), (5, 1)})
)
def test_models_on_four_ranks(ranks: RankPool, num_heads: int, num_kv_heads: int) -> None:
    assert_exact(ranks.run(prove, "llama", 4, **with_heads(num_heads, num_kv_heads)))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(7, 7), (6, 3), (1, 1)])
def test_models_on_two_ranks(pair: RankPool, num_heads: int, num_kv_heads: int) -> None:
    assert_exact(pair.run(prove, "llama", 2, **with_heads(num_heads, num_kv_heads)))


@pytest.mark.parametrize("num_heads", sampled([6, 2], {6}))
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_windows_and_sinks_with_odd_lengths(ranks: RankPool, name: str, num_heads: int) -> None:
    assert_exact(ranks.run(prove, name, 4, length=31, **with_heads(num_heads, num_heads // 2)))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "length"), [(6, 3, 33), (3, 1, 3)])
def test_padding(ranks: RankPool, num_heads: int, num_kv_heads: int, length: int) -> None:
    batch = make_batch(3, length)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    mask[2, length - length // 2 :] = 0
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    given = {**batch, "attention_mask": mask}
    assert_exact(ranks.run(prove, "llama", 4, batch=given, **with_heads(num_heads, num_kv_heads)))


@pytest.mark.parametrize("num_heads", [6, 3])
def test_double_precision(ranks: RankPool, num_heads: int) -> None:
    results = ranks.run(prove, "llama", 4, dtype=torch.float64, length=31, **with_heads(num_heads, 3))
    assert_exact(results, torch.float64)


def _prove_compiled(num_heads: int) -> dict[str, float]:
    torch._dynamo.reset()
    model = make_model("llama", num_hidden_layers=1, **with_heads(num_heads, num_heads))
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    return compare(model, 4, make_batch(2, 31), run=compiled)


def test_compiled_with_more_ranks_than_heads(ranks: RankPool) -> None:
    assert_exact(ranks.run(_prove_compiled, 3))


def count_step(num_heads: int, num_kv_heads: int) -> tuple[dict[str, int], list[list[int]]]:
    """Collectives of a step, and the bytes that each all-to-all is given, forward and backward."""
    model = transform(make_model("llama", num_hidden_layers=1, **with_heads(num_heads, num_kv_heads)), 4)
    batch = make_batch(2, 32)
    with CollectiveCounter() as forward:
        loss = model(**batch, num_items_in_batch=7).loss
    with CollectiveCounter() as backward:
        loss.backward()
    restore(model)
    return dict(forward.calls), [counter.sizes_bytes["all_to_all_single"] for counter in (forward, backward)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 3), (5, 1), (6, 2), (5, 5)])
def test_bytes_are_those_of_the_plan(ranks: RankPool, num_heads: int, num_kv_heads: int) -> None:
    """What a rank packs, itself included: each query head of a token once, each key and value head once a rank."""
    plan = HeadPlan(num_heads, num_kv_heads, 4)
    for rank, (calls, (forward, backward)) in enumerate(ranks.run(count_step, num_heads, num_kv_heads)):
        assert calls["all_to_all_single"] == 2
        packed = 2 * 8 * 4 * sum(plan.num_features(other, 8, 8) for other in range(4))
        output = 2 * 32 * 4 * len(plan.heads(rank)) * 8
        assert forward == [packed, output]
        received = 2 * 32 * 4 * plan.num_features(rank, 8, 8), 2 * 8 * 4 * num_heads * 8
        assert backward == [received[1], received[0]]
        assert plan.sent_features(rank, 8, 8) * 2 * 8 * 4 == packed - 2 * 8 * 4 * plan.num_features(rank, 8, 8)
