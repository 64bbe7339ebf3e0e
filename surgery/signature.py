"""What a graph was captured for: the inputs that are present, their dtypes and ranks, and the model's mode."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.errors import InputError

SEQUENCE_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids")
SCALAR_INPUTS = frozenset({"num_items_in_batch", "max_length_q", "max_length_k"})
COUNTED_INPUTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k"})
"""Inputs of one dimension that has its own length on every call: the ends of documents, of which there are many."""


class TensorInput(NamedTuple):
    """A tensor argument; each of `dims` is the batch "b", the sequence "s", any count "n", or a fixed size."""

    name: str
    dtype: torch.dtype
    device: torch.device
    dims: tuple[str | int, ...]


@dataclass(frozen=True)
class Signature:
    """The key of a captured graph. `state` fingerprints the model: mode, modules, parameter shapes and dtypes."""

    tensors: tuple[TensorInput, ...]
    constants: tuple[tuple[str, Any], ...]
    is_training: bool
    autocast_dtype: torch.dtype | None
    state: int

    def __str__(self) -> str:
        names = [tensor.name for tensor in self.tensors] + [f"{name}={value!r}" for name, value in self.constants]
        return f"{'train' if self.is_training else 'eval'}({', '.join(names)})"


@dataclass(frozen=True)
class BoundCall:
    """The arguments of one call of the model: tensors by name, constants by name, and its batch and sequence sizes."""

    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    batch_size: int
    length: int


def bind_call(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundCall:
    """Sort a call's arguments into tensors and constants; arguments that are None are as if not given."""
    try:
        bound = parameters.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(f"the model's forward cannot take these arguments: {error}") from error
    given = {name: value for name, value in bound.items() if value is not None and name != "kwargs"}
    given.update({name: value for name, value in bound.get("kwargs", {}).items() if value is not None})
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name in SCALAR_INPUTS & given.keys() - tensors.keys():
        tensors[name] = torch.tensor(given[name])
    constants = {name: value for name, value in given.items() if name not in tensors and name != "use_cache"}
    lead = next((tensors[name] for name in SEQUENCE_INPUTS if name in tensors), None)
    if lead is None or lead.ndim < 2:
        raise InputError(
            f"expected a batch of token sequences as one of {', '.join(SEQUENCE_INPUTS)}, of shape [B, S] or "
            f"[B, S, H]; found {', '.join(sorted(given)) or 'no arguments'}. Pass the whole batch on every rank."
        )
    return BoundCall(tensors, constants, lead.shape[0], lead.shape[1])


def describe_tensor(name: str, tensor: Tensor, batch_size: int, length: int) -> TensorInput:
    """Which of a tensor's dimensions vary from call to call.

    A batch of one is a signature of its own: models may branch on it, and torch.export takes any other for two or more.
    """
    if name in COUNTED_INPUTS and tensor.ndim == 1:
        return TensorInput(name, tensor.dtype, tensor.device, ("n",))
    dims: list[str | int] = []
    for dim, size in enumerate(tensor.shape):
        if dim == 0 and tensor.ndim > 1:
            dims.append("b" if size == batch_size and batch_size > 1 else int(size))
        elif size == length:
            dims.append("s")
        else:
            dims.append(int(size))
    return TensorInput(name, tensor.dtype, tensor.device, tuple(dims))


def describe_tensors(call: BoundCall) -> tuple[TensorInput, ...]:
    """The tensor inputs of a call, in the order in which a graph takes them."""
    return tuple(
        describe_tensor(name, call.tensors[name], call.batch_size, call.length) for name in sorted(call.tensors)
    )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a device, or None where it is off."""
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else None
