"""Every attention implementation is called for real, on this rank's heads: as exact as the unsharded model with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.flash import CALLS, flash_on_cpu, use
from tests.proof import assert_exact, compare
from tests.ranks import RankPool
from tests.test_masks_proof import padded
from tests.zoo import make_batch, make_model

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
LENGTHS = (5, 20, 7)
ENDS = torch.tensor([0, 5, 25, 32], dtype=torch.int32)


def packed() -> dict[str, Any]:
    """One row of documents, told apart by positions that start again."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {**make_batch(1, 32), "position_ids": positions}


def with_ends() -> dict[str, Any]:
    """One row of documents, told apart by where they end."""
    longest = max(LENGTHS)
    return {
        **make_batch(1, 32),
        "cu_seq_lens_q": ENDS,
        "cu_seq_lens_k": ENDS,
        "max_length_q": longest,
        "max_length_k": longest,
    }


BATCHES = {
    "causal": lambda: make_batch(2, 32),
    "padded": lambda: padded("right"),
    "padded_left": lambda: padded("left"),
    "packed": packed,
    "ends": with_ends,
}


def prove_flash(name: str, sp_size: int, implementation: str, batch: dict[str, Any], **changes: Any) -> Any:
    """The errors, and which of flash-attn's functions ran."""
    with flash_on_cpu():
        model = use(make_model(name, **changes), implementation)
        errors = compare(model, sp_size, batch)
        return errors, sorted(set(CALLS))


def assert_flash(results: list[Any], function: str) -> None:
    assert_exact([errors for errors, _ in results])
    assert all(calls == [function] for _, calls in results), results


@pytest.mark.parametrize("kind", BATCHES)
def test_flash(ranks: RankPool, kind: str) -> None:
    results = ranks.run(prove_flash, "llama", 2, "flash_attention_2", BATCHES[kind]())
    assert_flash(results, "dense" if kind == "causal" else "varlen")
