"""The conversions between placements that a rewritten graph calls.

They are plain tensor code around functional collectives, so that `torch.compile` sees and fuses the packing.
Cotangents are partial: every rank's backward computes an addend of the gradient. Then these pairs are adjoint, forward
/ backward:

    shard / zero-pad        gather / reduce-scatter        all-reduce / all-reduce

The exchange around attention, whose adjoint is an exchange, is in `surgery/exchange/heads.py`.

Letters: B batch, N heads, S sequence, H head size, P sequence-parallel ranks, F packed features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from surgery.axis import Axis, first_token, local_length, run_lengths
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


def split_dim(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`unflatten` in terms of `view`: Dynamo cannot trace the former inside `with torch.device(...)`."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x` itself, whose gradient is multiplied by `scale`."""
    return x.detach() + (x - x.detach()) * scale
