"""Operations that mix tokens come out exact or are refused by name, never wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from surgery import UnsupportedOperationError, transform
from surgery.verify.comparison import compare, float_is_double, run_simulated, run_whole
from surgery.verify.ranks import RankPool
from tests.planted import ODD_LENGTHS, PLANTED, make_planted, plant
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.zoo import make_batch, make_model

CANCELLING = {"layer_norm_over_tokens"}
"""It undoes the scale before it, whose gradient is zero in exact arithmetic: rounding noise in float32."""

ALIKE = {
    "average_pool",
    "cat_shifted",
    "cummax",
    "difference",
    "every_other_token",
    "in_place",
    "index_reversed",
    "layer_norm_over_both",
    "mean_of_all",
    "one_number_per_batch",
    "roll_flat",
    "seen_through_einsum",
    "shift_by_slice",
    "softmax_over_tokens",
    "sum_then_divide",
    "token_count_scale",
    "transposed_matmul",
    "tril_of_scores",
    "unfold",
    "variance_over_tokens",
    "view_merging_tokens",
}
"""Each much like another, which the default run has."""
ELSEWHERE = {*ODD_LENGTHS, "attention_without_heads", "batch_as_heads"}
"""Proven by default at an odd length, in `test_lengths.py`, or on four ranks, below."""


def _prove_planted(name: str) -> dict[str, float]:
    if name in CANCELLING:
        with float_is_double():
            return compare(make_planted(name).double(), 2, make_batch(2, 32))
    return compare(make_planted(name), 2, make_batch(2, 32))


@pytest.mark.parametrize("name", sampled(PLANTED, PLANTED.keys() - ALIKE - ELSEWHERE))
def test_planted(pair: RankPool, name: str) -> None:
    assert_exact(pair.run(_prove_planted, name))


def _prove_on_four(name: str) -> dict[str, float]:
    return compare(make_planted(name), 4, make_batch(3, 13))


@pytest.mark.parametrize("name", ["attention_without_heads", "batch_as_heads"])
def test_attention_without_heads_on_four_ranks(ranks: RankPool, name: str) -> None:
    assert_exact(ranks.run(_prove_on_four, name))


def test_products_of_three_are_ordered_by_no_sizes() -> None:
    """Where opt_einsum is installed, torch asks it for the best order, for which it reads sizes as numbers."""
    model, found = make_model("llama"), []

    def read_setting(x: Tensor, weight: Tensor) -> Tensor:
        found.append(torch.backends.opt_einsum.enabled)
        return x * 1.0

    plant(model, read_setting)
    before = torch.backends.opt_einsum.enabled
    transform(model, 2)
    assert found == [False] and torch.backends.opt_einsum.enabled == before


@pytest.mark.parametrize("name", ["causal_convolution", "roll", "cumsum", "first_token"])
def test_refused_on_request(name: str) -> None:
    model = make_planted(name)
    with pytest.raises(UnsupportedOperationError, match=r"mlp.*planted\.py:\d+.*on_unknown"):
        transform(model, 4, on_unknown="refuse")
    assert "surgery" not in model.__dict__


def test_plain_models_need_no_gathering() -> None:
    transform(make_model("llama"), 4, on_unknown="refuse")


@pytest.mark.parametrize(("name", "sp_size", "length"), [("squeezed", 4, 4), ("masked_by_distance", 8, 8)])
def test_one_token_or_one_head_a_rank(name: str, sp_size: int, length: int) -> None:
    """What has size one on a rank only is neither squeezed away nor taken for what broadcasts."""
    model, batch = make_planted(name), make_batch(2, length)
    twin = transform(copy.deepcopy(model), sp_size)
    assert_exact([run_simulated(twin, run_whole(model, batch), batch)])
