"""How every operation of a rewritten graph runs, as counts, and the ones worth a look by name.

    token-local   pointwise 2,331, views 1,610, contraction 225, ...     on shards, by their rules
    gathered      cumsum 1                                               whole on every rank: exact, and slower
    replicated    arange 1, view 1, ...                                  whole on every rank: should be integers

Only operations that make tensors count: taking a tuple apart and arithmetic on sizes do not.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from surgery import collectives
from surgery.metadata import facts_of, module_path, source_line
from surgery.placement import Replicated
from surgery.programs.program import Program
from surgery.report.layers import Repeated, fold
from surgery.report.listing import is_shown
from surgery.report.notation import notation_of, short_dtype, short_target
from surgery.shapes import length_dims, shape_of

CLASSES = {
    "attention": "exchanged",
    "exchange": "exchanged",
    "conversion": "converted",
    "gathered": "gathered",
    "region": "token-local region",
    "replicated": "replicated",
}
ORDER = ("token-local", "token-local region", "exchanged", "converted", "gathered", "replicated")


@dataclass(frozen=True)
class OperationCount:
    """The operations of one family, and how they run; `targets` are counted by name, most frequent first."""

    how: str
    family: str
    count: int
    targets: dict[str, int]


@dataclass(frozen=True)
class Gathered:
    """An operation that needs the whole sequence and is given it by an all-gather, and why."""

    operation: str
    path: str
    source_line: str
    reason: str


@dataclass(frozen=True)
class Whole:
    """A value with a sequence dimension that every rank holds whole."""

    operation: str
    path: str
    dtype: str
    shape: tuple[str, ...]
    is_integer: bool


def count_operations(program: Program) -> tuple[OperationCount, ...]:
    """The operations on tensors by family."""
    families: dict[str, Counter[str]] = {}
    for node in _operations(program.graph):
        families.setdefault(facts_of(node).family, Counter())[short_target(node)] += 1
    rows = [
        OperationCount(CLASSES.get(family, "token-local"), family, targets.total(), dict(targets.most_common()))
        for family, targets in families.items()
    ]
    return tuple(sorted(rows, key=lambda row: (ORDER.index(row.how), -row.count)))


def find_gathered(program: Program) -> tuple[Repeated[Gathered], ...]:
    """The operations that read a gathered value, those of identical layers once."""
    found = [_gathered(node) for node in _operations(program.graph) if _reads_gathered(node)]
    return tuple(fold(found, lambda g: g.path, lambda g: (g.operation, g.source_line, g.reason)))


def find_whole(program: Program) -> tuple[Repeated[Whole], ...]:
    """The values with a sequence dimension that are not sharded, those of identical layers once."""
    return tuple(fold(_whole_values(program), lambda w: w.path, lambda w: (w.operation, w.dtype, w.shape)))


def _operations(graph: fx.Graph) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if n.op == "call_function" and is_shown(n) and n.target is not operator.getitem)


def _reads_gathered(node: fx.Node) -> bool:
    if node.target is collectives.shard:
        return False
    return facts_of(node).family == "gathered" or any(s.target is collectives.gather for s in node.all_input_nodes)


def _gathered(node: fx.Node) -> Gathered:
    facts = facts_of(node)
    reason = facts.reason or f"{facts.family}: reads the whole sequence"
    return Gathered(short_target(node), module_path(node), source_line(node), reason)


def _whole_values(program: Program) -> Iterator[Whole]:
    notation = notation_of(program.context)
    for node in program.graph.nodes:
        value, placement = node.meta.get("val"), facts_of(node).placement
        if not is_shown(node) or not isinstance(value, Tensor) or not isinstance(placement, Replicated):
            continue
        if length_dims(shape_of(value), program.context.lengths):
            name = node.name if node.op == "placeholder" else short_target(node)
            is_integer = not (value.is_floating_point() or value.is_complex())
            yield Whole(name, module_path(node), short_dtype(value.dtype), notation.shape(value, placement), is_integer)
