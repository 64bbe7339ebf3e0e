"""A loader around a loader: every rank loads samples of its own, and all ranks train on each of them, a slice apiece.

    rank 0 loads a      rank 0 gives   a[first half]    b[first half]     then loads c
    rank 1 loads b      rank 1 gives   a[second half]   b[second half]    then loads d

What a rank needs of another's sample is its slice, so slices are all that travels: one all-to-all of bytes. Labels are
shifted before they are cut, and positions are those of the whole sequence. Samples may differ in length, and lengths
need not divide by the number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from surgery.axis import run_lengths
from surgery.errors import ConfigurationError, InputError
from surgery.inputs.sharded_inputs import SEQUENCE_NAMES, WHOLE_INPUTS, sliced_dim

CONSUMED = "ulysses_consumed"


@dataclass(frozen=True)
class Description:
    """What the other ranks must know of a rank's sample to take their slices apart.

    `shapes` are those of the slice for each rank; `whole` goes to all ranks as it is.
    """

    dtypes: dict[str, torch.dtype]
    shapes: list[dict[str, tuple[int, ...]]]
    whole: dict[str, Any]
    problem: str | None = None


class UlyssesSPDataLoaderAdapter:
    """Iterates over slices of the samples that all ranks of a group load with `dl`: `len(dl)` times `sp_world_size`.

    Batches of `dl` are mappings with `input_ids` [B, S] and, as a rule, `labels`; every tensor with the sequence in dim
    1 is cut (the queries of a mask [B, 1, S, S]), everything else goes to all ranks. `labels` become `shift_labels`.
    Slices are given on the CPU. Attributes, as `sampler` or `set_epoch`, are the loader's own; so is its state.

    Args:
        dl: the loader that each rank has, over samples of its own.
        sp_rank, sp_group, sp_world_size: this rank among those that share a sequence.
        device: where slices are on the way: that of the group's backend.
    """

    def __init__(self, dl: Any, sp_rank: int, sp_group: dist.ProcessGroup, sp_world_size: int, device: Any) -> None:
        if (sp_rank, sp_world_size) != (dist.get_rank(sp_group), dist.get_world_size(sp_group)):
            raise ConfigurationError(
                f"expected sp_rank {dist.get_rank(sp_group)} of sp_world_size {dist.get_world_size(sp_group)}, as the "
                f"group says, found {sp_rank} of {sp_world_size}. Ask the mpu: mpu.get_sequence_parallel_world_size()."
            )
        self.dl = dl
        self.sp_rank = sp_rank
        self.sp_group = sp_group
        self.sp_world_size = sp_world_size
        self.device = torch.device(device)
        self.iter: Iterator[Any] | None = None
        self.micro_batches: deque[dict[str, Any]] = deque()
        self._state_before: dict[str, Any] | None = None
        self._num_consumed = 0

    def __len__(self) -> int:
        return len(self.dl) * self.sp_world_size

    def __iter__(self) -> UlyssesSPDataLoaderAdapter:
        return self

    def __next__(self) -> dict[str, Any]:
        if not self.micro_batches:
            self.refill()
        self._num_consumed += 1
        return self.micro_batches.popleft()

    def __getattr__(self, name: str) -> Any:
        if name == "dl":
            raise AttributeError(name)
        attribute = getattr(self.dl, name)
        return {"state_dict": self._state, "load_state_dict": self._load_state}.get(name, attribute)

    def refill(self) -> None:
        """Load a sample on every rank, and take this rank's slice of each. Ends when no rank has one left."""
        if hasattr(self.dl, "state_dict"):
            self._state_before = self.dl.state_dict()
        if self.iter is None:
            self.iter = iter(self.dl)
        batch = next(self.iter, None)
        parts, own = _describe(batch, self.sp_world_size)
        descriptions: list[Description | None] = [None] * self.sp_world_size
        dist.all_gather_object(descriptions, own, group=self.sp_group)
        problems = [(rank, d.problem) for rank, d in enumerate(descriptions) if d is not None and d.problem is not None]
        if problems:
            raise InputError(f"the sample of rank {problems[0][0]}: {problems[0][1]}")
        if all(description is None for description in descriptions):
            self.iter = None
            raise StopIteration
        self.micro_batches.extend(self._exchange(parts, descriptions))
        self._num_consumed = 0

    def _exchange(self, parts: list[Tensor], descriptions: list[Description | None]) -> list[dict[str, Any]]:
        """Send `parts[p]`, in bytes, to rank p; the slices that arrive, one for each sample."""
        received_bytes = [_size_bytes(description, self.sp_rank) for description in descriptions]
        sent = torch.cat(parts).to(self.device)
        received = sent.new_empty(sum(received_bytes))
        dist.all_to_all_single(received, sent, received_bytes, [len(part) for part in parts], group=self.sp_group)
        pieces = received.cpu().split(received_bytes)
        return [
            _unpack(piece, description, self.sp_rank)
            for piece, description in zip(pieces, descriptions, strict=True)
            if description is not None
        ]

    def _state(self) -> dict[str, Any]:
        """The loader's state; within a round of samples, that before the round and how many slices were given of it."""
        if not self.micro_batches:
            return self.dl.state_dict()
        assert self._state_before is not None
        return {**self._state_before, CONSUMED: self._num_consumed}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.dl.load_state_dict({name: value for name, value in state.items() if name != CONSUMED})
        self.iter = None
        self.micro_batches.clear()
        for _ in range(state.get(CONSUMED, 0)):
            next(self)


def _describe(batch: Mapping[str, Any] | None, size: int) -> tuple[list[Tensor], Description | None]:
    """The bytes for each rank, and what they are; of a rank whose loader has ended, nothing."""
    nothing = [torch.empty(0, dtype=torch.uint8)] * size
    if batch is None:
        return nothing, None
    prepared = _prepare(dict(batch))
    problem = _find_problem(prepared)
    if problem is not None:
        return nothing, Description({}, [], {}, problem)
    tensors, whole = _sort(prepared)
    runs = run_lengths(prepared["input_ids"].shape[1], size)
    slices = [
        {name: tensor.narrow(sliced_dim(name, tensor), start - run, run) for name, tensor in tensors.items()}
        for start, run in zip(accumulate(runs), runs, strict=True)
    ]
    parts = [torch.cat([nothing[0], *(_bytes_of(tensor) for tensor in part.values())]) for part in slices]
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in slices]
    return parts, Description({name: tensor.dtype for name, tensor in tensors.items()}, shapes, whole)


def _prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """The sample with positions, and with `shift_labels` in place of `labels`."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        batch.setdefault("position_ids", torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
    labels = batch.pop("labels", None)
    if labels is not None:
        batch["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return batch


def _find_problem(batch: dict[str, Any]) -> str | None:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return f"expected input_ids [B, S] in every batch, found {', '.join(sorted(batch))}. Collate into a mapping."
    for name in SEQUENCE_NAMES & batch.keys():
        shape = tuple(batch[name].shape)
        if shape[sliced_dim(name, batch[name])] != ids.shape[1]:
            return f"{name} {shape} and input_ids {tuple(ids.shape)} differ in length. Collate them alike."
    return None


def _sort(batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that are cut, and all the rest."""
    length = batch["input_ids"].shape[1]
    cut = {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor)
        and value.ndim > 1
        and not name.startswith(WHOLE_INPUTS)
        and value.shape[sliced_dim(name, value)] == length
    }
    whole = {name: value for name, value in batch.items() if name not in cut}
    return cut, {name: value.cpu() if isinstance(value, Tensor) else value for name, value in whole.items()}


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _size_bytes(description: Description | None, rank: int) -> int:
    if description is None:
        return 0
    shapes = description.shapes[rank].items()
    return sum(torch.Size(shape).numel() * description.dtypes[name].itemsize for name, shape in shapes)


def _unpack(piece: Tensor, description: Description, rank: int) -> dict[str, Any]:
    """A slice as its sample's owner described it."""
    batch: dict[str, Any] = dict(description.whole)
    start = 0
    for name, shape in description.shapes[rank].items():
        dtype = description.dtypes[name]
        end = start + torch.Size(shape).numel() * dtype.itemsize
        batch[name] = piece[start:end].clone().view(dtype).view(shape)
        start = end
    return batch
