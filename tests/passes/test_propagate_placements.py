"""Where the sequence lives, from the inputs forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.canonicalize_sizes import CanonicalizeSizes
from passes.extract_assumptions import ExtractAssumptions
from passes.propagate_placements import PropagatePlacements, find_placements
from surgery.errors import UnsupportedOperationError
from surgery.metadata import KEY
from surgery.pipeline import Pass
from tests.golden import check_golden
from tests.tracing import copy_graph, make_context, operate, trace

SIZED: tuple[Pass, ...] = (ExtractAssumptions(), CanonicalizeSizes())
LAYER = ("b s", "99 6", "6 6", "b s")
LAYER_TYPES = (torch.int64, torch.float64, torch.float64, torch.int64)


def layer(ids: Tensor, table: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    hidden = F.embedding(ids, table)
    hidden = hidden + hidden.cumsum(1)
    logits = F.linear(hidden * torch.tanh(weight[0]), weight).reshape(-1, 6)
    return F.cross_entropy(logits, labels.reshape(-1)) + logits.mean()


def test_golden() -> None:
    done = operate(PropagatePlacements(), trace(layer, *LAYER, dtypes=LAYER_TYPES), prepared_by=SIZED)
    check_golden("propagate_placements.txt", str(done))
    assert [skip.reason for skip in done.result.skips] == ["mixes tokens"]
    assert done.result.skips[0].where.startswith("aten.cumsum.default at ")


def test_find_changes_nothing() -> None:
    graph = copy_graph(trace(layer, *LAYER, dtypes=LAYER_TYPES))
    context = make_context(graph, 8, 3)
    CanonicalizeSizes().run(graph, context)
    assert find_placements(graph, context)
    assert not any(KEY in node.meta for node in graph.nodes)


def test_leaves_integers_and_weights_whole() -> None:
    module = trace(
        lambda i, w: (i.cumsum(1), i.roll(1, 1) + 1, w @ w), "b s", "6 6", dtypes=(torch.int64, torch.float64)
    )
    done = operate(PropagatePlacements(), module, prepared_by=SIZED)
    assert done.result.changed == 0
    assert "sharded" not in done.after


def test_refuses_to_gather_on_request() -> None:
    message = r"aten.cumsum.default at .*: mixes tokens, so it cannot run on sequence shards.*Use on_unknown=\"gather\""
    with pytest.raises(UnsupportedOperationError, match=message):
        operate(PropagatePlacements(), trace(layer, *LAYER, dtypes=LAYER_TYPES), prepared_by=SIZED, on_unknown="refuse")


def test_refuses_unknown_operations_on_request() -> None:
    module = trace(lambda x: torch.fft.fft(x * 2, dim=1).real, "b s 6")
    with pytest.raises(UnsupportedOperationError, match=r"aten.fft_fft.default at .*: no rule"):
        operate(PropagatePlacements(), module, prepared_by=SIZED, on_unknown="refuse")
