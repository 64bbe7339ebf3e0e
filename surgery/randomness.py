"""Dropout on shards: every rank draws its own pattern, and the ranks' generators stay in step.

    torch.manual_seed(0) on all ranks   ->   rank 0 drops features of its tokens, rank 1 others of its own

Ranks are usually seeded alike. Drawing straight from the default generator would then repeat one pattern on every
shard. Instead each draw takes one seed from the default generator, the same on all ranks, and adds the rank to it:
reproducible from one seed, the same again when activations are recomputed, and the generators are as far along on
every rank afterwards. A value that is whole on every rank keeps what rank 0 keeps of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from surgery.collectives import Axis, all_reduce

SEEDS = 2**32  # the CPU generator reads 32 bits of a seed
SPACING = 0x9E3779B1  # odd, so that every rank lands on a seed of its own


@contextmanager
def rank_stream(rank: int, device: torch.device) -> Iterator[None]:
    """Draw from a stream of this rank's own while the block runs."""
    seed = int(torch.randint(SEEDS, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed + rank * SPACING) % SEEDS)
        yield


@torch.library.custom_op("surgery::dropout_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def dropout_mask(like: Tensor, p: float, rank: int) -> Tensor:
    """Which elements this rank keeps: a boolean tensor of the shape of `like`, True with probability 1 - p."""
    with rank_stream(rank, like.device):
        return torch.rand(like.shape, device=like.device) >= p


@dropout_mask.register_fake
def _(like: Tensor, p: float, rank: int) -> Tensor:
    return torch.empty_like(like, dtype=torch.bool)


def sharded_dropout(input: Tensor, p: float, train: bool, *, axis: Axis) -> Tensor:  # noqa: A002  (ATen's name)
    """`torch.nn.functional.dropout` of this rank's shard, by a pattern of its own."""
    if not train:
        return input
    return _drop(input, torch.ops.surgery.dropout_mask(input, p, axis.rank), p)


def sharded_native_dropout(
    input: Tensor,  # noqa: A002
    p: float,
    train: bool | None,
    *,
    axis: Axis,
) -> tuple[Tensor, Tensor]:
    """The same for ATen's `native_dropout`, which also returns what it kept."""
    if train is False:
        return input, torch.ones_like(input, dtype=torch.bool)
    kept = torch.ops.surgery.dropout_mask(input, p, axis.rank)
    return _drop(input, kept, p), kept


def whole_dropout(input: Tensor, p: float, train: bool, *, axis: Axis) -> Tensor:  # noqa: A002
    """`dropout` of a value that every rank holds: by the pattern of rank 0, whatever the others' generators say."""
    if not train:
        return input
    kept = torch.ops.surgery.dropout_mask(input, p, axis.rank).to(input.dtype)
    return _drop(input, all_reduce(kept if axis.rank == 0 else torch.zeros_like(kept), axis), p)


def _drop(x: Tensor, kept: Tensor, p: float) -> Tensor:
    return x * kept / (1 - p) if p < 1.0 else x * 0.0
