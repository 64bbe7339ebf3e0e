"""Conversions stand where placements differ, each once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.canonicalize_sizes import CanonicalizeSizes
from passes.insert_conversions import InsertConversions
from passes.propagate_placements import PropagatePlacements
from passes.relax_views import RelaxViews
from surgery import collectives
from surgery.pipeline import Pass
from tests.golden import check_golden
from tests.tracing import operate, trace

PLACED: tuple[Pass, ...] = (CanonicalizeSizes(), PropagatePlacements())


def mixed(ids: Tensor, table: Tensor) -> Tensor:
    hidden = F.embedding(ids, table).reshape(ids.shape[0], ids.shape[1], 2, 3)
    centred = hidden - hidden.mean(1, keepdim=True)
    return centred.cumsum(1) * centred.cummax(1).values * hidden


def test_golden() -> None:
    module = trace(mixed, "b s", "99 6", dtypes=(torch.int64, torch.float64))
    done = operate(InsertConversions(), module, prepared_by=PLACED)
    check_golden("insert_conversions.txt", str(done))
    assert len(done.graph.find_nodes(op="call_function", target=collectives.gather)) == 1, "two users, one gather"


def test_leaves_whole_values_alone() -> None:
    done = operate(InsertConversions(), trace(lambda w, x: (w @ w, x.sum()), "6 6", "s", dtypes=(torch.int64,) * 2))
    assert done.result.changed == 0
    assert done.before == done.after


def test_sizes_used_as_numbers_stay_global() -> None:
    module = trace(lambda x: (x * 2).sum(1) / x.shape[1], "b s 6")
    done = operate(InsertConversions(), module, prepared_by=PLACED)
    assert "aten.div(all_reduce, sequence_length)" in done.after


def test_sizes_are_written_out_where_a_rank_may_hold_no_tokens() -> None:
    module = trace(lambda x: (x * 2).reshape(x.shape[0], x.shape[1], -1, 3), "b s 6")
    done = operate(InsertConversions(), module, prepared_by=(*PLACED[:1], RelaxViews(), *PLACED[1:]))
    assert "aten.reshape(mul, [batch_size, local_length, 2, 3])" in done.after


def test_local_sizes_are_computed_once() -> None:
    module = trace(
        lambda x: (x.reshape(-1, 6) * 2).reshape(x.shape[0] * x.shape[1], 2, 3).sin().reshape(x.shape), "b s 6"
    )
    done = operate(InsertConversions(), module, prepared_by=(*PLACED[:1], RelaxViews(), *PLACED[1:]))
    assert done.after.count("= local_length(") == 1


def test_factors_leave_whole() -> None:
    done = operate(InsertConversions(), trace(lambda x: (x * 2).reshape(-1, 6), "b s 6"), prepared_by=PLACED)
    assert "return [gather]" in done.after
    assert "gather(reshape, 0, batch_size, 1, sequence_length)" in done.after
