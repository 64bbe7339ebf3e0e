"""Batches that a loader has already cut: every rank's slice is put together once a call, before the graph.

    rank 0   ids [B, 3]   labels [B, 3]  ┐     lengths: one all-gather      ┌  ids [B, 8]   labels [B, 8]
    rank 1   ids [B, 5]   labels [B, 5]  ┘     integers: one all-gather     └  the same on both ranks

What follows is then right by itself: positions that were left out are those of the whole sequence, labels are shifted
before they are cut, masks see all tokens. Slices may be of any lengths; they are taken in the order of the ranks. What
leaves the graph as shards of equal runs is dealt out again, so that every rank has the logits of its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from surgery.axis import Axis, run_lengths
from surgery.collectives import gather_runs
from surgery.errors import InputError
from surgery.inputs.agreement import hash_arguments
from surgery.inputs.signature import SAMPLE_INPUTS, BoundCall, has_images
from surgery.private import all_gather_first_dim, all_to_all_runs

WHOLE_INPUTS = ("cu_seq_lens", "num_items_in_batch")
"""Arguments that describe the whole batch, by the start of their names: every rank passes the same."""
SEQUENCE_NAMES = frozenset({"position_ids", "attention_mask", "labels", "shift_labels"})
"""Arguments that have a place for every token, if they are given."""
FIELDS = ("arguments", "batch size", "slices")
Runs = tuple[int, ...]


@dataclass(frozen=True)
class Slices:
    """What the ranks passed: `lengths` are their runs of the sequence, in order."""

    lengths: Runs
    axis: Axis

    @property
    def are_equal(self) -> bool:
        return all(length == self.lengths[0] for length in self.lengths)

    @property
    def even_lengths(self) -> Runs:
        """How many tokens of the whole sequence each rank of a graph holds."""
        return run_lengths(sum(self.lengths), self.axis.size)

    @property
    def is_even(self) -> bool:
        """Whether the slices are the runs that a graph gives to its ranks."""
        return self.are_equal or self.lengths == self.even_lengths

    def deal_out(self, x: Tensor, dim: int) -> Tensor:
        """A value that a graph left as even runs along `dim`, as this rank's own tokens."""
        return redistribute(x, dim, self.even_lengths, self.lengths, self.axis)


def assemble(call: BoundCall, axis: Axis, problem: str | None = None) -> tuple[BoundCall, Slices]:
    """The call that all ranks together make, and how its sequence was cut; `problem` is one that this rank has already.

    Raises `InputError` on every rank if the calls do not go together, naming what differs.
    """
    dims, misfit = find_sequence_dims(call)
    slices = Slices(exchange_lengths(call, problem or misfit, axis), axis)
    _check_masks(call, dims, sum(slices.lengths))
    tensors = dict(call.tensors)
    integers = {name: dim for name, dim in dims.items() if not call.tensors[name].is_floating_point()}
    tensors.update(_gather_packed({name: call.tensors[name] for name in integers}, integers, slices))
    for name in dims.keys() - integers.keys():
        moved = call.tensors[name].movedim(dims[name], 0)
        tensors[name] = gather_runs(moved, slices.lengths, slices.axis).movedim(0, dims[name])
    return replace(call, tensors=tensors, lengths={"s": sum(slices.lengths)}), slices


def find_sequence_dims(call: BoundCall) -> tuple[dict[str, int], str | None]:
    """The dimension of each argument that is cut, and what is wrong with the arguments, if anything."""
    dims: dict[str, int] = {}
    if "t" in call.lengths:
        return {}, "an encoder-decoder has two sequences. Expected whole inputs: inputs='whole'."
    if has_images(call):
        return {}, "the images of a slice are not told from those of the others. Expected whole inputs: inputs='whole'."
    for name in sorted(call.tensors):
        tensor = call.tensors[name]
        is_of_sequences = tensor.ndim == 1 and name in SAMPLE_INPUTS
        if tensor.ndim == 0 or is_of_sequences or name.startswith(WHOLE_INPUTS):
            continue
        dim = sliced_dim(name, tensor)
        if tensor.shape[dim] == call.length:
            dims[name] = dim
        elif name in SEQUENCE_NAMES:
            return {}, (
                f"{name} {tuple(tensor.shape)}: expected this rank's slice, {call.length} tokens in dim {dim}, like "
                "the ids. Cut all of them alike, or transform with inputs='whole'."
            )
    return dims, None


def sliced_dim(name: str, tensor: Tensor) -> int:
    """Where the tokens lie: [B, S, ...]; positions [..., S]; the queries of a mask [B, 1, S, S]."""
    if name == "position_ids" or tensor.ndim == 1:
        return tensor.ndim - 1
    return 2 if tensor.ndim == 4 else 1


def exchange_lengths(call: BoundCall, problem: str | None, axis: Axis) -> Runs:
    """How many tokens each rank passed; raises on every rank if one has a `problem`, or if the calls differ.

    A compiled graph cannot wait for the others' lengths, and takes them to be its own.
    """
    if torch.compiler.is_compiling():
        if problem is not None:
            raise InputError(problem)
        return (call.length,) * axis.size
    device = next(iter(call.tensors.values())).device
    row = torch.tensor([[hash_arguments(call), call.batch_size, problem is not None, call.length]], device=device)
    rows = all_gather_first_dim(row, axis.size, axis.group_name)
    *columns, lengths = rows.T.tolist()
    if any(columns[2]):
        raise InputError(problem or f"the slices of rank {columns[2].index(1)} do not fit. See the error there.")
    for field, column in zip(FIELDS, columns, strict=True):
        if len(set(column)) > 1:
            shown = f" ({', '.join(map(str, column))})" if field == "batch size" else ""
            raise InputError(
                f"the calls of the {axis.size} ranks that share a sequence differ in {field}{shown}. Expected a slice "
                "of the same batch on each. UlyssesSPDataLoaderAdapter cuts batches so."
            )
    return tuple(lengths)


def gather_slices(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The ranks' slices of an output end to end along `dim`, whatever their lengths. Differentiable."""
    lengths: Runs = (x.shape[dim],) * axis.size
    if not torch.compiler.is_compiling():
        own = torch.tensor([x.shape[dim]], device=x.device)
        lengths = tuple(all_gather_first_dim(own, axis.size, axis.group_name).tolist())
    return gather_runs(x.movedim(dim, 0), lengths, axis).movedim(0, dim)


def _check_masks(call: BoundCall, dims: dict[str, int], length: int) -> None:
    for name in dims:
        tensor = call.tensors[name]
        if tensor.ndim == 4 and tensor.shape[3] != length:
            raise InputError(
                f"{name} {tuple(tensor.shape)}: expected the rows of this rank's tokens over all {length} keys, "
                f"[B, 1, {call.length}, {length}]. A mask of a rank's own keys says nothing about the others'."
            )


def _gather_packed(tensors: dict[str, Tensor], dims: dict[str, int], slices: Slices) -> dict[str, Tensor]:
    """All integers and booleans in one all-gather: [S/P, F] columns side by side -> [S, F]."""
    if not tensors:
        return {}
    moved = {name: tensor.movedim(dims[name], 0) for name, tensor in tensors.items()}
    columns = [tensor.reshape(tensor.shape[0], tensor.shape[1:].numel()).long() for tensor in moved.values()]
    whole = gather_runs(torch.cat(columns, dim=1), slices.lengths, slices.axis)
    pieces = whole.split([column.shape[1] for column in columns], dim=1)
    return {
        name: piece.reshape(-1, *tensor.shape[1:]).movedim(0, dims[name]).to(tensor.dtype)
        for (name, tensor), piece in zip(moved.items(), pieces, strict=True)
    }


def redistribute(x: Tensor, dim: int, source: Runs, target: Runs, axis: Axis) -> Tensor:
    """From runs of `source` lengths to runs of `target` lengths, only what changes hands. Differentiable.

    source 4 | 4      t0 t1 t2 t3 | t4 t5 t6 t7
    target 3 | 5      t0 t1 t2 | t3 t4 t5 t6 t7        rank 0 sends t3
    """
    sent = [overlap(source, axis.rank, target, other) for other in range(axis.size)]
    received = [overlap(source, other, target, axis.rank) for other in range(axis.size)]
    moved = x.movedim(dim, 0).contiguous()
    return all_to_all_runs(moved, sent, received, axis.group_name).movedim(0, dim)


def overlap(first: Runs, i: int, second: Runs, j: int) -> int:
    """How many tokens the i-th of the `first` runs and the j-th of the `second` share."""
    ends = list(accumulate(first))[i], list(accumulate(second))[j]
    return max(0, min(ends) - max(ends[0] - first[i], ends[1] - second[j]))
