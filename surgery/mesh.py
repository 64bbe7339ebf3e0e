"""The process groups: ranks in a (dp, sp) grid, sequence-parallel ranks side by side.

    world of 8, sp_size 4        sp ->
                          dp     0 1 2 3        ranks 0-3 share one batch, each holding a quarter of every sequence
                           |     4 5 6 7        ranks 4-7 share another

`SequenceMesh` answers what DeepSpeed and Megatron ask an *mpu* for. It belongs to one model's surgery: there is no
global one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from surgery.collectives import Axis
from surgery.errors import ConfigurationError

DP, SP = "dp", "sp"


class SequenceMesh:
    """The groups of one transformed model, with the methods of an mpu."""

    def __init__(self, mesh: DeviceMesh, *, is_owner: bool) -> None:
        self.mesh = mesh
        self._is_owner = is_owner
        self._model_group: dist.ProcessGroup | None = None

    @property
    def axis(self) -> Axis:
        group = self.get_sequence_parallel_group()
        return Axis(group.size(), group.rank(), group.group_name)

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(SP)

    def get_sequence_parallel_world_size(self) -> int:
        return self.get_sequence_parallel_group().size()

    def get_sequence_parallel_rank(self) -> int:
        return self.get_sequence_parallel_group().rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same run of different sequences."""
        return self.mesh.get_group(DP)

    def get_data_parallel_world_size(self) -> int:
        return self.get_data_parallel_group().size()

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group().rank()

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """All ranks: those over which gradients are averaged and ZeRO shards."""
        group = dist.group.WORLD
        assert group is not None
        return group

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
        return SequenceMesh(self.mesh, is_owner=False)

    def close(self) -> None:
        """Destroy the groups that were made for this mesh."""
        if not self._is_owner or not dist.is_initialized():
            return
        groups = [self.mesh.get_group(SP), self.mesh.get_group(DP), self._model_group]
        for group in groups:
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def make_mesh(sp_size: int, mesh: DeviceMesh | None = None) -> SequenceMesh | None:
    """Groups for `sp_size` ranks, from `mesh` or from the default process group; None where there is no process group.

    Raises `ConfigurationError` before any group is made if the ranks disagree or the sizes do not fit.
    """
    if mesh is not None:
        return SequenceMesh(_checked(mesh, sp_size), is_owner=False)
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
    return SequenceMesh(grid, is_owner=True)


def check_agreement(what: str, value: Any, group: dist.ProcessGroup | None = None) -> None:
    """Raise `ConfigurationError` on every rank of `group` if `value` is not the same on all of them."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    if any(other != values[0] for other in values):
        found = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
        raise ConfigurationError(f"expected the same {what} on every rank, found {found}. Make the ranks agree.")


def _checked(mesh: DeviceMesh, sp_size: int) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    if SP not in names or DP not in names:
        raise ConfigurationError(f"expected a mesh with dimensions {DP!r} and {SP!r}, found {names}. Name them so.")
    if mesh[SP].size() != sp_size:
        raise ConfigurationError(f"the mesh has {mesh[SP].size()} ranks in {SP!r}, but sp_size is {sp_size}.")
    return mesh


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    is_gloo = dist.get_backend() == "gloo"
    return "cpu" if is_gloo or accelerator is None else accelerator.type
