"""Functions whose closures hold tensors of a trace, made again around the tensors of a step.

    def seen(batch, head, q, k): return ids[batch, q] == ids[batch, k]

    lift(seen, tensors)          the code of `seen`, a slot where `ids` was; `ids` is appended to tensors
    fill(lifted, [other])        the same function, of `other`

A model may hand over a mask function that it wrote itself. Its code is all there is to know about it, and enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Place:
    """Where the `index`-th tensor goes."""

    index: int


@dataclass(frozen=True, eq=False)
class LiftedFunction:
    """A function's code, and what it closes over, with places for tensors."""

    function: FunctionType
    cells: tuple[Any, ...]
    defaults: tuple[Any, ...]


class UnliftableError(Exception):
    """Something in a closure may hold tensors, and is not known; `args[0]` says what."""


def lift(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with places for the tensors in it, which are appended to `tensors`. Raises `UnliftableError`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Place(len(tensors) - 1)
    if isinstance(value, FunctionType) and not value.__kwdefaults__:
        cells = tuple(lift(cell.cell_contents, tensors) for cell in value.__closure__ or ())
        return LiftedFunction(value, cells, lift(value.__defaults__ or (), tensors))
    if type(value) is tuple:
        return tuple(lift(entry, tensors) for entry in value)
    if type(value) in CONSTANTS:
        return value
    raise UnliftableError(type(value).__name__)


def fill(value: Any, tensors: list[Tensor]) -> Any:
    """What was lifted, with `tensors` in its places."""
    if isinstance(value, Place):
        return tensors[value.index]
    if isinstance(value, tuple):
        return tuple(fill(entry, tensors) for entry in value)
    if not isinstance(value, LiftedFunction):
        return value
    cells = tuple(CellType(fill(cell, tensors)) for cell in value.cells)
    function = value.function
    return FunctionType(
        function.__code__, function.__globals__, function.__name__, fill(value.defaults, tensors), cells
    )
