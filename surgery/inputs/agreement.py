"""Whether the ranks of a group hold the same batch, or shards of one sequence: an error on all instead of nonsense.

rank 0: [signature, B, S, checksum]   --all-gather-->   every rank compares all rows
rank 0: [tokens of its shard]         --all-gather-->   every rank knows the whole length
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from surgery.axis import Axis, run_lengths
from surgery.errors import InputError
from surgery.inputs.signature import BoundCall, Constants, TensorInputs
from surgery.options import CheckInputs
from surgery.private import all_gather_first_dim

SHOWN_FIELDS = ("batch size", "sequence length", "decoder's sequence length")
FIELDS = ("arguments", *SHOWN_FIELDS, "contents")
PERIOD = 8191


class CallComparison:
    """Compares the calls of a group's ranks: the first of each kind, always, or never."""

    def __init__(self, check_inputs: CheckInputs) -> None:
        self.check_inputs = check_inputs
        self._compared: set[tuple[TensorInputs, Constants]] = set()

    def check(self, call: BoundCall, group: dist.ProcessGroup) -> None:
        """Raise `InputError` on every rank of `group` if their calls differ, where a comparison is due."""
        if self.check_inputs == "never":
            return
        kind = call.kind
        if self.check_inputs == "always" or kind not in self._compared:
            check_same_call(call, group)
            self._compared.add(kind)


def check_same_call(call: BoundCall, group: dist.ProcessGroup) -> None:
    """Raise `InputError` on every rank of `group` if their calls differ in arguments, sizes or contents."""
    device = next(iter(call.tensors.values())).device
    row = torch.tensor(
        [[hash_arguments(call), call.batch_size, *_two_lengths(call), _checksum(call)]],
        dtype=torch.float64,
        device=device,
    )
    rows = all_gather_first_dim(row, group.size(), group.group_name)
    for field, column in zip(FIELDS, rows.T.tolist(), strict=True):
        if len(set(column)) > 1:
            shown = f" ({', '.join(f'{int(value):,}' for value in column)})" if field in SHOWN_FIELDS else ""
            raise InputError(
                f"the calls of the {group.size()} ranks that share a sequence differ in {field}{shown}. "
                "Expected the same whole batch on each. Seed their data loaders alike, and shard batches over the "
                "data-parallel ranks only: mpu.get_data_parallel_rank()."
            )


def whole_length(own: int, axis: Axis, device: torch.device) -> int:
    """The length S of a sequence of which this rank holds `own` tokens; raises on every rank if that is no shard."""
    if torch.compiler.is_compiling():
        raise InputError(
            "gather() inside torch.compile cannot ask the other ranks how many tokens they hold. Expected the length "
            "of the whole sequence. Call gather(value, length=input_ids.shape[1])."
        )
    lengths = all_gather_first_dim(torch.tensor([own], device=device), axis.size, axis.group_name).tolist()
    if tuple(lengths) != run_lengths(sum(lengths), axis.size):
        raise InputError(
            f"expected the shards of one sequence, found {', '.join(map(str, lengths))} tokens on the ranks. "
            "Gather what the model returned, along the dimension that holds the sequence: gather(value, dim)."
        )
    return int(sum(lengths))


def _two_lengths(call: BoundCall) -> tuple[int, int]:
    """The length of the sequence, and that of the decoder's, or 0 where there is none."""
    lengths = [*call.lengths.values(), 0]
    return lengths[0], lengths[1]


def hash_arguments(call: BoundCall) -> int:
    """A number that differs where the names, dtypes or ranks of the tensors, or the constants, do."""
    described = [(name, str(tensor.dtype), tensor.ndim) for name, tensor in sorted(call.tensors.items())]
    constants = [(name, _told(value)) for name, value in sorted(call.constants.items())]
    return zlib.crc32(repr((described, constants)).encode())


def _told(value: object) -> object:
    """What `repr` may tell of a value on every rank alike: of a plain object it tells where it lies."""
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else value


def _checksum(call: BoundCall) -> float:
    return float(sum(_weighted_sum(call.tensors[name]) for name in sorted(call.tensors)))


def _weighted_sum(tensor: Tensor) -> Tensor:
    """A sum that also changes when elements trade places."""
    flat = tensor.detach().reshape(-1).double()
    weights = torch.arange(flat.numel(), device=flat.device) % PERIOD + 1
    return (flat * weights).sum().cpu()
