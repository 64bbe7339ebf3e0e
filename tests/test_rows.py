"""More ranks than heads: those of one head share its queries, exactly, and are sent no more than the plan needs."""

from __future__ import annotations

import ast
import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from torch import Tensor
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForSeq2SeqLM

from passes.seed_random_operations import is_apart
from surgery import transform
from surgery.attention.implementations import sdpa
from surgery.attention.recorded import RecordedCall
from surgery.axis import Axis
from surgery.collectives import shard
from surgery.exchange.own_rows import causal_rows, own_rows
from surgery.exchange.row_plan import RowPlan
from surgery.exchange.row_sharing import EAGER, MODELS, is_row_wise
from surgery.exchange.rows import exchange_from_rows, exchange_to_rows
from surgery.verify.comparison import run_simulated, run_whole
from surgery.verify.ranks import RankPool
from surgery.verify.simulation import simulated_ranks
from tests.backends import assert_flash, prove_flash, prove_own, register_own
from tests.batches import packed, padded
from tests.head_settings import Setting, check, count_step, draw_settings, with_heads
from tests.proof import assert_exact, prove
from tests.sequences import prove_head, translated
from tests.worlds import World
from tests.zoo import make_batch, make_model

FEW_HEADS = [(num_heads, size) for size in range(2, 9) for num_heads in range(1, size)]


@pytest.mark.parametrize(("num_heads", "size"), FEW_HEADS)
def test_each_row_of_each_head_has_one_rank(num_heads: int, size: int) -> None:
    plan = RowPlan(num_heads, 1, size)
    for head in range(num_heads):
        sharers = plan.sharers(head)
        assert [plan.heads(rank) for rank in sharers] == [range(head, head + 1)] * len(sharers)
        assert [rank for sharer in sharers for rank in plan.row_ranks(sharer)] == list(range(size))
        assert all(plan.rows(sharer, 19)[1] == plan.rows(sharer + 1, 19)[0] for sharer in sharers[:-1])
    counts = [len(plan.sharers(head)) for head in range(num_heads)]
    assert sum(counts) == size and max(counts) - min(counts) <= 1


def test_plan_of_the_docstring() -> None:
    plan = RowPlan(2, 1, 5)
    assert [plan.heads(rank).start for rank in range(5)] == [0, 0, 0, 1, 1]
    assert [list(plan.row_ranks(rank)) for rank in range(5)] == [[0], [1, 2], [3, 4], [0, 1], [2, 3, 4]]


SETTINGS = draw_settings(size=(2, 6), length=(2, 9), num_kv_heads=(1, 3), group=(1, 3)).filter(
    lambda setting: setting.num_kv_heads * setting.group < setting.size
)


def attend_on_rows(setting: Setting, tokens: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    def attend(axis: Axis) -> Tensor:
        query, key, value = (shard(x, 2, 1, 1, axis) for x in tokens)
        rows = exchange_to_rows(query, key, value, setting.length, setting.length, axis)
        place: Any = {"num_heads": query.shape[1], "length": setting.length, "axis": axis}
        mask, is_causal = setting.make_mask(), setting.mask == "causal"
        mask = own_rows(mask, 2, **place) if mask is not None else causal_rows(rows[1], **place) if is_causal else None
        output = sdpa(*rows, mask, 0.0, None, is_causal=is_causal, axis=axis)
        return exchange_from_rows(output, query.shape[1], setting.length, axis)

    with simulated_ranks(setting.size) as run:
        return torch.cat(run(attend), dim=2)


@given(SETTINGS)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_exchange_and_attention(setting: Setting) -> None:
    check(setting, attend_on_rows)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "length"), [(3, 3, 31), (2, 1, 33), (1, 1, 3)])
def test_models(ranks: RankPool, num_heads: int, num_kv_heads: int, length: int) -> None:
    assert_exact(ranks.run(prove, "llama", 4, length=length, **with_heads(num_heads, num_kv_heads)))


def test_two_ranks_of_one_head(pair: RankPool) -> None:
    assert_exact(pair.run(prove, "llama", 2, length=31, batch_size=3, **with_heads(1, 1)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents(ranks: RankPool, implementation: str) -> None:
    given = {"batch": packed((5, 19, 7)), "attn_implementation": implementation}
    assert_exact(ranks.run(prove, "llama", 4, **given, **with_heads(3, 1)))


def test_padding_with_soft_caps_and_windows(ranks: RankPool) -> None:
    assert_exact(ranks.run(prove, "gemma2", 4, batch=padded("both"), **with_heads(2, 1)))


HEADS = ("encoder_attention_heads", "decoder_attention_heads", "num_attention_heads", "num_heads")


def _with_heads(num_heads: int) -> dict[str, Any]:
    width = 16 * num_heads
    return {**dict.fromkeys(HEADS, num_heads), "hidden_size": width, "d_model": width}


def test_cross_attention(world: World) -> None:
    changes = _with_heads(world.sp_size - 1)
    assert_exact(world.run(prove_head, AutoModelForSeq2SeqLM, "bart", world.sp_size, **changes))


def test_bias_of_positions() -> None:
    """Of t5, [1, N, S, S]: cut to a rank's head and rows. Ranks are simulated: its capture is slow."""
    model, batch = make_model("t5", auto=AutoModelForSeq2SeqLM, **_with_heads(3)), translated()
    reference = run_whole(copy.deepcopy(model), batch)
    assert_exact([run_simulated(transform(model, 4), reference, batch)])
    assert all(site.shares_rows for site in model.surgery.programs[-1].context.sites)


def test_dropout_of_shared_rows_draws_apart() -> None:
    model = transform(make_model("llama", attention_dropout=0.5, **with_heads(1, 1)), 4)
    context = model.surgery.programs[0].context
    assert all(site.shares_rows and is_apart(site.node) for site in context.sites)


def eager_functions() -> Iterator[Callable[..., Any]]:
    """The eager attention of every model of transformers, once where several have the same."""
    found: dict[str, tuple[Path, str]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith(EAGER):
                found.setdefault(ast.unparse(ast.Module(node.body, [])), (path, node.name))
    for path, name in found.values():
        yield getattr(importlib.import_module(f"{MODELS}{path.parent.name}.{path.stem}"), name)


@pytest.mark.sweep
def test_eager_attention_takes_each_query_by_itself() -> None:
    """What `is_row_wise` says of all of it: some rows of the queries, mask and bias give those rows of the output."""
    module = SimpleNamespace(num_key_value_groups=1, head_dim=4, training=False, sinks=torch.ones(1))
    query, key, value = torch.randn(2, 1, 7, 4), torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 4)
    mask, bias = torch.randn(2, 1, 7, 9), torch.randn(1, 1, 7, 9)
    for function in eager_functions():
        assert is_row_wise(RecordedCall("eager", function, "", 1, 1, (), tree_flatten({})[1]))
        keywords = {"scaling": 0.5, "softcap": 2.0}
        whole = function(module, query, key, value, mask, **keywords, position_bias=bias)[0]
        rows = function(
            module, query[:, :, 2:5], key, value, mask[:, :, 2:5], **keywords, position_bias=bias[:, :, 2:5]
        )
        torch.testing.assert_close(rows[0], whole[:, 2:5])


def test_other_functions_leave_ranks_idle(ranks: RankPool) -> None:
    """A function of a user's own may read the positions of its queries: it is called with all of them."""
    assert_exact(ranks.run(prove_own, "soft", 4, make_batch(2, 31), **with_heads(2, 1)))


def test_flash_leaves_ranks_idle(ranks: RankPool) -> None:
    assert_flash(
        ranks.run(prove_flash, "llama", 4, "flash_attention_2", make_batch(2, 31), **with_heads(3, 1)), "dense"
    )


def test_the_report_says_who_shares_and_who_waits() -> None:
    register_own()
    reports = [
        transform(make_model("llama", attn_implementation=name, **with_heads(3, 1)), 4).surgery.report().to_text(200)
        for name in ("sdpa", "soft")
    ]
    assert "exchanged, 1-2 ranks a head" in reports[0] and "1 of 3" in reports[0]
    assert "0-1 of 3" in reports[1]
    assert "1 of 4 ranks wait for its 3 heads: the attention function 'soft' is not known" in reports[1]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 1), (1, 1)])
def test_bytes_are_those_of_the_plan(ranks: RankPool, num_heads: int, num_kv_heads: int) -> None:
    """Of each token its keys and values go to every rank, each query head to one, which sends one result back."""
    plan, token = RowPlan(num_heads, num_kv_heads, 4), 2 * 8 * 4 * 8  # a head of the tokens that a rank holds
    for rank, (calls, (forward, backward)) in enumerate(ranks.run(count_step, num_heads, num_kv_heads)):
        served = len(plan.row_ranks(rank))
        packed, output = (num_heads + 4 * 2) * token, served * token
        received, home = (served + 4 * 2) * token, num_heads * token
        assert calls["all_to_all_single"] == 2
        assert (forward, backward) == ([packed, output], [home, received])
        itself = rank in plan.row_ranks(rank)
        assert (plan.sent_queries(rank) + 3 * 2) * token == packed - (itself + 2) * token
        assert plan.returned_features(rank, 8) * token // 8 == output - itself * token
