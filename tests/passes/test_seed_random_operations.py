"""Every random operation is given a seed: for a rank's own tokens its own, else one that all ranks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.canonicalize_sizes import CanonicalizeSizes
from passes.insert_conversions import InsertConversions
from passes.locate_attention import LocateAttention
from passes.propagate_placements import PropagatePlacements
from passes.seed_random_operations import SeedRandomOperations, find_random_operations, is_apart
from surgery.pipeline import Pass
from surgery.randomness import dropout
from tests.golden import check_golden
from tests.tracing import operate, trace

CONVERTED: tuple[Pass, ...] = (CanonicalizeSizes(), LocateAttention(), PropagatePlacements(), InsertConversions())
PLACED = CONVERTED[:-1]


def noisy(x: Tensor) -> Tensor:
    hidden = F.dropout(x * 2, 0.1) + torch.rand_like(x) + torch.randn(x.shape)
    return F.dropout1d(hidden, 0.5) * torch.rand(6)


def test_golden() -> None:
    done = operate(SeedRandomOperations(), trace(noisy, "b s 6"), prepared_by=CONVERTED)
    check_golden("seed_random_operations.txt", str(done))
    assert done.result.changed == 5
    assert dropout in {node.target for node in done.graph.nodes}, "the one that compiles"
    streams = [node.kwargs["stream"] for node in done.graph.nodes if "stream" in node.kwargs]
    assert streams == [0, 4, 8, 12, 16], "each rank has a stream of its own in each"


def test_leaves_alone_what_draws_nothing() -> None:
    def quiet(x: Tensor) -> Tensor:
        heads = x[:, None]
        attended = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.0)[:, 0]
        return F.dropout(attended, 0.5, training=False) + F.dropout(x, 0.0)

    done = operate(SeedRandomOperations(), trace(quiet, "b s 6"), prepared_by=CONVERTED)
    assert done.result.changed == 0 and done.before == done.after


def test_finds_attention_with_dropout() -> None:
    def attend(x: Tensor) -> Tensor:
        heads = (x * 2)[:, None]
        return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)[:, 0]

    done = operate(PropagatePlacements(), trace(attend, "b s 6"), prepared_by=PLACED[:-1])
    (site,) = done.context.sites
    assert find_random_operations(done.graph, done.context) == [site.node]
    assert is_apart(site.node)
