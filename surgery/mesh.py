"""The process groups: ranks in a (dp, sp) grid, sequence-parallel ranks side by side.

    world of 8, sp_size 4        sp ->
                          dp     0 1 2 3        ranks 0-3 share one batch, each holding a quarter of every sequence
                           |     4 5 6 7        ranks 4-7 share another

`SequenceMesh` answers what DeepSpeed and Megatron ask an *mpu* for. It belongs to one model's surgery: there is no
global one. Its groups are made here, or taken from a mesh or an mpu that a user has already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from surgery.axis import Axis
from surgery.engines import DEEPSPEED_SCALES, DEEPSPEED_SHARDS, is_asked_by
from surgery.errors import ConfigurationError

DP, SP = "dp", "sp"


class SequenceMesh:
    """The groups of one transformed model, with the methods of an mpu.

    `data` is None where the given mesh has no data parallelism, `everyone` where dp x sp is not all of the world.
    """

    def __init__(
        self,
        sequence: dist.ProcessGroup,
        data: dist.ProcessGroup | None,
        everyone: dist.ProcessGroup | None,
        *,
        is_owner: bool,
    ) -> None:
        self._sequence = sequence
        self._data = data
        self._everyone = everyone
        self._is_owner = is_owner
        self._model_group: dist.ProcessGroup | None = None

    @property
    def axis(self) -> Axis:
        return Axis(self._sequence.size(), self._sequence.rank(), self._sequence.group_name)

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self._sequence

    def get_sequence_parallel_world_size(self) -> int:
        """P; but 1 where DeepSpeed asks what to multiply gradients by (see `surgery/engines.py`)."""
        return 1 if is_asked_by(DEEPSPEED_SCALES) else self._sequence.size()

    def get_sequence_parallel_rank(self) -> int:
        return self._sequence.rank()

    @property
    def has_data_parallel(self) -> bool:
        """Whether it is known which ranks hold other sequences; none do where the sp ranks are the world."""
        return self._data is not None or self._everyone is not None

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same run of different sequences; all ranks where ZeRO 3 asks what to shard over."""
        if is_asked_by(DEEPSPEED_SHARDS):
            return self.get_sequence_data_parallel_group()
        if self._data is not None:
            return self._data
        if self.has_data_parallel:
            return self.get_model_parallel_group()
        raise ConfigurationError(
            "the mesh that this model was given does not say which ranks hold the same run of other sequences. "
            f"Expected a dimension {DP!r} beside {SP!r}. Name it so, or ask the mesh itself."
        )

    def get_data_parallel_world_size(self) -> int:
        return self.get_data_parallel_group().size()

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group().rank()

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """All dp x sp ranks: those over which gradients are averaged and ZeRO shards."""
        if self._everyone is None:
            raise ConfigurationError(
                f"the mesh that this model was given is not {DP!r} x {SP!r} over all ranks, so it does not say over "
                "which of them gradients are averaged. Pass an mpu that has get_sequence_data_parallel_group()."
            )
        return self._everyone

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.get_sequence_data_parallel_group().size()

    def get_sequence_data_parallel_rank(self) -> int:
        return self.get_sequence_data_parallel_group().rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """A group of this rank alone: no parameter is split. Made on first use; every rank must ask."""
        if self._model_group is None:
            self._model_group, _ = dist.new_subgroups(group_size=1)
        return self._model_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def initialize_sequence_parallel(self, sequence_parallel_size: int) -> None:
        """For engines that ask an mpu to make its groups: they exist, so only the size is checked."""
        if sequence_parallel_size != self.get_sequence_parallel_world_size():
            raise ConfigurationError(
                f"this mesh has {self.get_sequence_parallel_world_size()} sequence-parallel ranks; found a request for "
                f"{sequence_parallel_size}. Transform the model with sp_size={sequence_parallel_size}."
            )

    def shared(self) -> SequenceMesh:
        """The same groups for another model, which leaves them open when it is restored."""
        return SequenceMesh(self._sequence, self._data, self._everyone, is_owner=False)

    def close(self) -> None:
        """Destroy the groups that were made for this mesh."""
        if not self._is_owner or not dist.is_initialized():
            return
        for group in (self._sequence, self._data, self._model_group):
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def make_mesh(sp_size: int, given: Any = None) -> SequenceMesh | None:
    """Groups for `sp_size` ranks, `given` or from the default process group; None where there is no process group.

    Raises `ConfigurationError` before any group is made if the ranks disagree or the sizes do not fit.
    """
    if given is not None:
        return adopt_mesh(given, sp_size)
    if not dist.is_available() or not dist.is_initialized():
        return None
    world_size = dist.get_world_size()
    check_agreement("sp_size", sp_size)
    if world_size % sp_size:
        fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ConfigurationError(
            f"sp_size {sp_size} does not divide the world of {world_size} ranks. "
            f"Use sp_size {', '.join(map(str, fitting))}, or launch a multiple of {sp_size} ranks."
        )
    grid = init_device_mesh(_device_type(), (world_size // sp_size, sp_size), mesh_dim_names=(DP, SP))
    return SequenceMesh(grid.get_group(SP), grid.get_group(DP), dist.group.WORLD, is_owner=True)


def adopt_mesh(given: Any, sp_size: int) -> SequenceMesh:
    """The groups of a `DeviceMesh` with a dimension "sp", or of an mpu with `get_sequence_parallel_group()`.

    They stay the caller's. Raises `ConfigurationError` if there is no such group of `sp_size` ranks around this one.
    """
    if isinstance(given, SequenceMesh):
        adopted = given.shared()
    else:
        adopted = _from_device_mesh(given) if isinstance(given, DeviceMesh) else _from_mpu(given)
    if adopted.get_sequence_parallel_world_size() != sp_size:
        raise ConfigurationError(
            f"the mesh has {adopted.get_sequence_parallel_world_size()} ranks in {SP!r}, but sp_size is {sp_size}. "
            "Make them agree."
        )
    return adopted


def _from_device_mesh(mesh: DeviceMesh) -> SequenceMesh:
    names = mesh.mesh_dim_names or ()
    if SP not in names:
        raise ConfigurationError(
            f"expected a mesh with a dimension {SP!r}, and {DP!r} for data parallelism; found {names}. Name them so."
        )
    sequence = mesh.get_group(SP)
    data = mesh.get_group(DP) if DP in names else None
    return SequenceMesh(sequence, data, _everyone(sequence, data), is_owner=False)


def _from_mpu(mpu: Any) -> SequenceMesh:
    sequence = _group_of(mpu, "get_sequence_parallel_group")
    if sequence is None:
        raise ConfigurationError(
            f"expected a DeviceMesh with a dimension {SP!r}, or an mpu with get_sequence_parallel_group(); found "
            f"{type(mpu).__name__}. Pass one of them, or neither."
        )
    data = _group_of(mpu, "get_data_parallel_group")
    everyone = _group_of(mpu, "get_sequence_data_parallel_group") or _everyone(sequence, data)
    return SequenceMesh(sequence, data, everyone, is_owner=False)


def _group_of(mpu: Any, method: str) -> dist.ProcessGroup | None:
    """What `mpu` answers, or None if it has no such method. Raises `ConfigurationError` for anything but a group."""
    if not hasattr(mpu, method):
        return None
    try:
        group = getattr(mpu, method)()
    except Exception as error:
        raise ConfigurationError(
            f"{method}() of the given mpu failed: {error!r}. Initialize its groups first."
        ) from error
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigurationError(
            f"expected {method}() of the given mpu to be a process group that this rank is in, found {group!r}. "
            "Call transform() on the ranks of the group only."
        )
    return group


def _everyone(sequence: dist.ProcessGroup, data: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The world, where it is made of dp x sp ranks and no others."""
    is_whole = sequence.size() * (data.size() if data is not None else 1) == dist.get_world_size()
    return dist.group.WORLD if is_whole else None


def check_agreement(what: str, value: Any, group: dist.ProcessGroup | None = None) -> None:
    """Raise `ConfigurationError` on every rank of `group` if `value` is not the same on all of them."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    if any(other != values[0] for other in values):
        found = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
        raise ConfigurationError(f"expected the same {what} on every rank, found {found}. Make the ranks agree.")


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    is_gloo = dist.get_backend() == "gloo"
    return "cpu" if is_gloo or accelerator is None else accelerator.type
