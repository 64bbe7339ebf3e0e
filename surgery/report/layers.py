"""Layers: the repeated modules of a model, and one line for what repeats.

    model.layers.0.self_attn, model.layers.1.self_attn, ...     ->   model.layers.{0..31}.self_attn   x 32
    model.layers.5, model.layers.11, model.layers.17            ->   model.layers.{5, 11, 17}         x 3

The layer of a path is its first component that is a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from torch import fx

from surgery.metadata import module_path

T = TypeVar("T")

INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
MOST_RUNS = 4


@dataclass(frozen=True, order=True)
class Layer:
    """One of a stack of modules: `model.layers` at `index`."""

    stack: str
    index: int

    @property
    def path(self) -> str:
        return f"{self.stack}.{self.index}" if self.stack else str(self.index)


@dataclass(frozen=True)
class Repeated(Generic[T]):
    """Items that differ in nothing but the layer: the first of them, and the path of them all."""

    path: str
    count: int
    first: T


def split_path(path: str) -> tuple[Layer | None, str]:
    """A module path as its layer and the rest: `model.layers.3.mlp` is layer 3 of `model.layers`, and `mlp`."""
    match = INDEX.search(path)
    if match is None:
        return None, path
    return Layer(path[: match.start()].rstrip("."), int(match.group())), path[match.end() :].lstrip(".")


def layer_of(node: fx.Node) -> Layer | None:
    """The layer that `node` was traced in, or None outside the stacks."""
    return split_path(module_path(node))[0]


def fold(items: Iterable[T], path_of: Callable[[T], str], key_of: Callable[[T], Hashable]) -> list[Repeated[T]]:
    """Collapse items with equal keys whose paths differ only in the layer, in order of first appearance."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        layer, rest = split_path(path_of(item))
        groups.setdefault((layer and layer.stack, rest, key_of(item)), []).append(item)
    return [_repeated(group, [path_of(item) for item in group]) for group in groups.values()]


def _repeated(group: list[T], paths: list[str]) -> Repeated[T]:
    layer, rest = split_path(paths[0])
    if layer is None:
        return Repeated(paths[0], len(group), group[0])
    indices = {other.index for other, _ in map(split_path, paths) if other is not None}
    return Repeated(f"{fold_path(layer.stack, indices)}{'.' if rest else ''}{rest}", len(group), group[0])


def fold_path(stack: str, indices: Iterable[int]) -> str:
    """`model.layers.{0..31}`, or `model.layers.3` for a single one."""
    ordered = sorted(indices)
    written = str(ordered[0]) if len(ordered) == 1 else f"{{{fold_indices(ordered)}}}"
    return f"{stack}.{written}" if stack else written


def fold_indices(ordered: list[int]) -> str:
    """`0..4, 6..10` for runs, `0, 2 .. 30` for even steps."""
    steps = {later - index for index, later in pairwise(ordered)}
    if len(ordered) > 2 and len(steps) == 1 and steps != {1}:
        return f"{ordered[0]}, {ordered[1]} .. {ordered[-1]}"
    runs: list[list[int]] = []
    for index in ordered:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    written = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(written if len(written) <= MOST_RUNS else [*written[: MOST_RUNS - 1], "..", written[-1]])
