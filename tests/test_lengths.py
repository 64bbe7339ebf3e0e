"""Any length: sequences that P does not divide, and sequences of fewer tokens than ranks, are exact too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery import restore, transform
from surgery.axis import first_token, local_length, longest_run, run_lengths
from surgery.collectives import Axis
from surgery.private import GroupName
from tests.planted import PLANTED, make_planted
from tests.proof import assert_exact, compare, prove
from tests.ranks import RankPool
from tests.zoo import make_batch, make_model

SHORT = 3
"""Fewer tokens than the four ranks."""


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 10, 31, 32])
def test_runs_are_balanced_and_cover_the_sequence(length: int, size: int) -> None:
    lengths = run_lengths(length, size)
    assert sum(lengths) == length
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) == longest_run(length, size)
    for rank, own in enumerate(lengths):
        assert first_token(length, rank, size) == sum(lengths[:rank])
        assert local_length(length, Axis(size, rank, GroupName("sp"))) == own


@pytest.mark.parametrize("sp_size", [2, 4])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 31), (3, 33), (2, SHORT)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_odd_lengths(ranks: RankPool, name: str, batch_size: int, length: int, sp_size: int) -> None:
    assert_exact(ranks.run(prove, name, sp_size, batch_size=batch_size, length=length))


@pytest.mark.parametrize("length", [31, SHORT])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "mixtral", "gpt_oss", "bloom", "falcon", "phi3"])
def test_odd_lengths_elsewhere(ranks: RankPool, name: str, length: int) -> None:
    """Windows, experts, sinks, gathered operations, packed projections."""
    assert_exact(ranks.run(prove, name, 4, length=length))
