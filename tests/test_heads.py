"""Any head counts: the plan alone, the exchange with attention on simulated ranks, whole models on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from surgery.exchange.head_plan import HeadPlan
from surgery.verify.comparison import compare
from surgery.verify.ranks import RankPool
from tests.head_settings import (
    Setting,
    check,
    count_step,
    draw_settings,
    with_heads,
)
from tests.proof import assert_exact, prove
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model

COUNTS = [(6, 3), (6, 6), (5, 1), (7, 7), (8, 1), (3, 1), (2, 2), (2, 1), (1, 1), (12, 6), (14, 2)]


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


SETTINGS = draw_settings(size=(1, 5), length=(1, 9), num_kv_heads=(1, 6), group=(1, 4))


@given(SETTINGS)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_exchange_and_attention(setting: Setting) -> None:
    check(setting)


@pytest.mark.sweep
@given(SETTINGS)
@settings(max_examples=10_000, deadline=None)
def test_exchange_and_attention_at_length(setting: Setting) -> None:
    check(setting)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), sampled([(6, 3), (7, 7), (5, 1), (3, 3), (2, 1), (1, 1)], {(6, 3), (5, 1)})
)
def test_models_on_four_ranks(ranks: RankPool, num_heads: int, num_kv_heads: int) -> None:
    assert_exact(ranks.run(prove, "llama", 4, **with_heads(num_heads, num_kv_heads)))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), sampled([(7, 7), (6, 3), (1, 1)], {(7, 7), (1, 1)}))
def test_models_on_two_ranks(pair: RankPool, num_heads: int, num_kv_heads: int) -> None:
    assert_exact(pair.run(prove, "llama", 2, **with_heads(num_heads, num_kv_heads)))


WINDOWS = [(name, num_heads) for name in ("mistral", "gpt_oss") for num_heads in (6, 2)]


@pytest.mark.parametrize(("name", "num_heads"), sampled(WINDOWS, {("gpt_oss", 6)}))
def test_windows_and_sinks_with_odd_lengths(ranks: RankPool, name: str, num_heads: int) -> None:
    changes = {"num_hidden_layers": 1, **with_heads(num_heads, num_heads // 2)}
    assert_exact(ranks.run(prove, name, 4, length=31, **changes))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "length"), [(6, 3, 33), (3, 1, 3)])
def test_padding(ranks: RankPool, num_heads: int, num_kv_heads: int, length: int) -> None:
    batch = make_batch(3, length)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    mask[2, length - length // 2 :] = 0
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    given = {**batch, "attention_mask": mask}
    assert_exact(ranks.run(prove, "llama", 4, batch=given, **with_heads(num_heads, num_kv_heads)))


@pytest.mark.parametrize("num_heads", sampled([6, 3], {3}))
def test_double_precision(ranks: RankPool, num_heads: int) -> None:
    results = ranks.run(prove, "llama", 4, dtype=torch.float64, length=31, **with_heads(num_heads, 3))
    assert_exact(results, torch.float64)


def _prove_compiled(sp_size: int) -> dict[str, float]:
    torch._dynamo.reset()
    model = make_model("llama", **with_heads(sp_size - 1, sp_size - 1))
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    return compare(model, sp_size, make_batch(2, 31), run=compiled)


@pytest.mark.sweep
def test_compiled_with_more_ranks_than_heads(world: World) -> None:
    assert_exact(world.run(_prove_compiled, world.sp_size))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), sampled([(6, 3), (5, 1), (6, 2), (5, 5)], {(6, 3), (5, 1)}))
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
