"""The proof every capability lands with: loss, logits and unscaled gradients equal the unsharded model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from surgery import restore, transform
from surgery.verify.comparison import TOLERANCE, compare, float_is_double, run_sharded, run_whole, worst
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


def prove_calls(
    model: Any, sp_size: int, calls: Sequence[tuple[Callable[[Any], Any], dict[str, Any]]], **options: Any
) -> tuple[list[dict[str, float]], int]:
    """The errors of each call of one transformed model, on this rank, and how many graphs they took.

    A call is a change, made to the model and its transformed twin, and a batch. `options` are those of `transform`.
    """
    twin, found = transform(copy.deepcopy(model), sp_size, **{"example": calls[0][1], **options}), []
    for change, batch in calls:
        for each in (model, twin):
            change(each)
            each.zero_grad()
        found.append(run_sharded(twin, run_whole(model, batch), batch))
    num_programs = len(twin.surgery.programs)
    restore(twin)
    return found, num_programs


def prove_batches(
    name: str, sp_size: int, batches: Iterable[dict[str, Any]], **changes: Any
) -> tuple[list[dict[str, float]], int]:
    """The errors of each batch of one tiny model, on this rank, and how many graphs they took."""
    return prove_unchanged(make_model(name, **changes), sp_size, batches)


def prove_unchanged(model: Any, sp_size: int, batches: Iterable[dict[str, Any]]) -> tuple[list[dict[str, float]], int]:
    """The same of a model that is at hand."""
    return prove_calls(model, sp_size, [(lambda model: None, batch) for batch in batches])


def assert_exact(results: list[dict[str, float]], dtype: torch.dtype = torch.float32) -> None:
    """Every rank's errors are within the tolerance of `dtype`."""
    for rank, errors in enumerate(results):
        error, name = worst(errors)
        assert error <= TOLERANCE[dtype], f"rank {rank}: {name} is off by {error:.2e} (allowed {TOLERANCE[dtype]:.0e})"


def assert_calls_exact(
    results: list[tuple[list[dict[str, float]], int]], num_programs: int, dtype: torch.dtype = torch.float32
) -> None:
    """Every call of `prove_calls` is exact on every rank, and they took so many graphs."""
    for by_rank in zip(*(calls for calls, _ in results), strict=True):
        assert_exact(list(by_rank), dtype)
    assert [count for _, count in results] == [num_programs] * len(results)
