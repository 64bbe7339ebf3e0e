"""Sizes come from the inputs, whatever value the model asked."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.canonicalize_sizes import CanonicalizeSizes, find_sizes
from tests.golden import check_golden
from tests.tracing import operate, trace


def reshaped_by_late_sizes(x: Tensor) -> Tensor:
    flat = x.reshape(-1, 6)
    merged = torch.cat([flat, flat])
    return torch.ops.aten.reshape(merged, [2, torch.ops.aten.sym_size(flat, 0), 6])


def test_golden() -> None:
    done = operate(CanonicalizeSizes(), trace(reshaped_by_late_sizes, "b s 6"))
    check_golden("canonicalize_sizes.txt", str(done))
    assert done.result.changed == 2
    assert len(find_sizes(done.graph)) == 2, "one for the batch, one for the sequence"


def test_leaves_alone_a_graph_that_asks_for_no_size() -> None:
    done = operate(CanonicalizeSizes(), trace(lambda x: x * 2, "b s 6"))
    assert done.result.changed == 0
    assert [node.name for node in done.context.sizes.values()] == ["batch_size", "sequence_length"]


def test_leaves_alone_a_size_that_counts_data() -> None:
    done = operate(CanonicalizeSizes(), trace(lambda x: x.new_zeros((x > 0).nonzero().shape[0]), "b s 6"))
    assert done.result.changed == 0 and len(find_sizes(done.graph)) == 3
