"""The backward's seed: 1 on every rank for an average, 1/P for a sum."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.canonicalize_sizes import CanonicalizeSizes
from passes.insert_conversions import InsertConversions
from passes.propagate_placements import PropagatePlacements
from passes.scale_output_gradients import ScaleOutputGradients, find_whole_outputs
from surgery.pipeline import Pass
from tests.golden import check_golden
from tests.tracing import operate, trace

CONVERTED: tuple[Pass, ...] = (CanonicalizeSizes(), PropagatePlacements(), InsertConversions())


def loss_and_logits(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = x * 2
    return logits.mean(), logits, torch.arange(x.shape[1])


def test_golden() -> None:
    done = operate(ScaleOutputGradients(), trace(loss_and_logits, "b s 6"), prepared_by=CONVERTED, gradients="sum")
    check_golden("scale_output_gradients.txt", str(done))
    assert done.result.changed == 1, "the loss: not the sharded logits, not the integers"


def test_leaves_an_average_alone() -> None:
    done = operate(ScaleOutputGradients(), trace(loss_and_logits, "b s 6"), prepared_by=CONVERTED)
    assert done.result.changed == 0
    assert done.before == done.after
    output = next(iter(reversed(done.graph.nodes)))
    assert [source.name for source in find_whole_outputs(output)] == ["all_reduce"]
