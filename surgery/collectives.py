"""The functions that a rewritten graph calls: conversions between placements, and losses on shards.

They are plain tensor code around functional collectives, so that `torch.compile` sees and fuses the packing.
Cotangents are partial: every rank's backward computes an addend of the gradient. Then these pairs are adjoint, forward
/ backward:

    shard / zero-pad        gather / reduce-scatter        all-reduce / all-reduce

The exchange around attention, whose adjoint is an exchange, is in `surgery/exchange.py`.

Letters: B batch, N heads, S sequence, H head size, P sequence-parallel ranks, F packed features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from surgery.axis import Axis as Axis
from surgery.axis import first_token, local_length, run_lengths
from surgery.private import all_gather_first_dim, all_reduce_sum, all_to_all_runs


def shard(x: Tensor, dim: int, outer: int, inner: int, axis: Axis) -> Tensor:
    """Take this rank's run of the sequence: `[..., outer * S * inner, ...] -> [..., outer * S/P * inner, ...]`."""
    if outer == 1 and inner == 1:
        return _own_run(x, dim, axis)
    return _own_run(split_dim(x, dim, (outer, -1, inner)), dim + 1, axis).flatten(dim, dim + 2)


def _own_run(x: Tensor, dim: int, axis: Axis) -> Tensor:
    length = x.shape[dim]
    return x.narrow(dim, first_token(length, axis.rank, axis.size), local_length(length, axis))


def gather(x: Tensor, dim: int, outer: int, inner: int, length: int, axis: Axis) -> Tensor:
    """Make a sequence of S tokens whole: `[..., outer * S/P * inner, ...] -> [..., outer * S * inner, ...]`."""
    split = split_dim(x, dim, (outer, local_length(length, axis), inner)).movedim(dim + 1, 0)
    whole = gather_runs(split, run_lengths(length, axis.size), axis)
    return whole.movedim(0, dim + 1).flatten(dim, dim + 2)


def gather_runs(x: Tensor, lengths: Sequence[int], axis: Axis) -> Tensor:
    """The ranks' runs end to end in dim 0, on every rank. Backward: each gets the sum of its run's gradients.

    An all-gather takes equal runs only. Others travel in an all-to-all, in which each rank sends its own to all: no
    byte more. So do those that are not known to be equal, compiled for any length: to ask would compile twice.
    """
    if all(statically_known_true(length == lengths[0]) for length in lengths):
        return all_gather_first_dim(x.contiguous(), axis.size, axis.group_name)
    copies = x.expand(axis.size, *x.shape).flatten(0, 1)
    return all_to_all_runs(copies, [x.shape[0]] * axis.size, lengths, axis.group_name)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks of a value of which each holds an addend."""
    return all_reduce_sum(x, axis.group_name)


def mean_addend(
    self: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, count: int, axis: Axis
) -> Tensor:
    """This rank's addend of a mean over `count` elements of the whole, summed in float32 at least."""
    result = self.dtype if dtype is None else dtype
    precise = torch.promote_types(result, torch.float32)
    local = self.sum(dtype=precise) if dim is None else self.sum(dim, keepdim, dtype=precise)
    return (local / count).to(result)


def sharded_cross_entropy(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    *,
    whole_target: Tensor,
    axis: Axis,
) -> Tensor:
    """This rank's addend of a cross-entropy; `reduction` as in ATen (1 mean, 2 sum)."""
    addend = F.cross_entropy(
        self, target, weight, ignore_index=int(ignore_index), reduction="sum", label_smoothing=label_smoothing
    )
    return addend / _label_weight(whole_target, weight, ignore_index).to(addend.dtype) if reduction == 1 else addend


def sharded_nll_loss(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    *,
    whole_target: Tensor,
    axis: Axis,
) -> Tensor:
    """This rank's addend of a negative log-likelihood; `reduction` as in ATen (1 mean, 2 sum)."""
    addend = F.nll_loss(self, target, weight, ignore_index=int(ignore_index), reduction="sum")
    return addend / _label_weight(whole_target, weight, ignore_index).to(addend.dtype) if reduction == 1 else addend


def _label_weight(labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean over labels divides by: their count, or the sum of their classes' weights."""
    counted = labels != ignore_index
    if weight is None:
        return counted.sum()
    return torch.where(counted, weight[labels.clamp(min=0)], 0).sum()


def split_dim(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`unflatten` in terms of `view`: Dynamo cannot trace the former inside `with torch.device(...)`."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x` itself, whose gradient is multiplied by `scale`."""
    return x.detach() + (x - x.detach()) * scale
