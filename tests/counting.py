"""Counting what a model does: collectives with their bytes, and what autograd keeps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast")


class CollectiveCounter(TorchDispatchMode):
    """Counts functional collectives by name, and the bytes and element counts of their inputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.sizes_bytes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("_c10d_functional", "c10d") and name.rstrip("_") in COLLECTIVES:
            self.calls[name.rstrip("_")] += 1
            tensor = next(arg for arg in args if isinstance(arg, Tensor))
            self.sizes_bytes.setdefault(name.rstrip("_"), []).append(tensor.numel() * tensor.element_size())
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.calls.values())


class SavedActivations:
    """The bytes of distinct storages that autograd saves for backward, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters and tensor.is_floating_point():
            self._storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor.detach())
        return tensor

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def total_bytes(self) -> int:
        return sum(self._storages.values())
