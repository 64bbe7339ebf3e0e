"""The proof every capability lands with: loss, logits and unscaled gradients equal the unsharded model's."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from surgery.comparison import TOLERANCE, compare, float_is_double, worst
from tests.zoo import make_batch, make_model


def prove(
    name: str,
    sp_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 2,
    length: int = 32,
    is_training: bool = True,
    batch: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, float]:
    """The errors of one architecture of the zoo, on this rank."""
    model = make_model(name, dtype=dtype, **changes).train(is_training)
    with float_is_double() if dtype == torch.float64 else nullcontext():
        return compare(model, sp_size, make_batch(batch_size, length) if batch is None else batch)


def assert_exact(results: list[dict[str, float]], dtype: torch.dtype = torch.float32) -> None:
    """Every rank's errors are within the tolerance of `dtype`."""
    for rank, errors in enumerate(results):
        error, name = worst(errors)
        assert error <= TOLERANCE[dtype], f"rank {rank}: {name} is off by {error:.2e} (allowed {TOLERANCE[dtype]:.0e})"
