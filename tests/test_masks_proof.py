"""Padding, packed documents and explicit masks: exact, where the references attend to what they should not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.proof import assert_exact, prove
from tests.ranks import RankPool
from tests.zoo import make_batch


def padded(side: str) -> dict[str, Any]:
    """Rows of different lengths, padded on the left, the right or both sides; padding carries no labels."""
    batch = make_batch(3, 32)
    mask = torch.ones(3, 32, dtype=torch.long)
    for row, count in enumerate((0, 5, 17)):
        if side in ("left", "both"):
            mask[row, :count] = 0
        if side in ("right", "both"):
            mask[row, 32 - count // (2 if side == "both" else 1) :] = 0
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return {**batch, "attention_mask": mask}


def packed(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Documents end to end, told apart by positions that start again."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {**make_batch(2, int(positions.numel())), "position_ids": positions.expand(2, -1).contiguous()}


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "opt"])
def test_padding(ranks: RankPool, name: str, side: str) -> None:
    assert_exact(ranks.run(prove, name, 4, batch=padded(side)))


def test_a_mask_of_ones(ranks: RankPool) -> None:
    batch = {**make_batch(2, 32), "attention_mask": torch.ones(2, 32, dtype=torch.long)}
    assert_exact(ranks.run(prove, "llama", 4, batch=batch))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mistral"])
def test_packed_documents(ranks: RankPool, name: str) -> None:
    assert_exact(ranks.run(prove, name, 4, batch=packed((5, 20, 7))))


def test_given_positions_of_one_document(ranks: RankPool) -> None:
    assert_exact(ranks.run(prove, "llama", 4, batch=packed((32,))))


def test_explicit_mask(pair: RankPool) -> None:
    visible = torch.ones(32, 32, dtype=torch.bool).tril().logical_and(torch.rand(32, 32) < 0.7)
    visible = visible | torch.eye(32, dtype=torch.bool)
    batch = {**make_batch(2, 32), "attention_mask": visible.expand(2, 1, -1, -1).contiguous()}
    assert_exact(pair.run(prove, "llama", 2, batch=batch))


def test_eager_implementation(ranks: RankPool) -> None:
    assert_exact(ranks.run(prove, "llama", 4, batch=padded("right"), attn_implementation="eager"))
