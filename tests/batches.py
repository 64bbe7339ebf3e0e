"""Batches that tests share: padded, packed, of two lengths."""

from __future__ import annotations

from typing import Any

import torch

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
