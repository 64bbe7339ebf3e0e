"""Passes and the order they run in: each a small frozen value that changes a graph and says what it did."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import fx

from surgery.metadata import Context, PassRecord, Skip


@dataclass(frozen=True)
class PassResult:
    """How many nodes a pass changed, and what it left alone and why."""

    changed: int
    skips: tuple[Skip, ...] = ()


class Pass(Protocol):
    """What `run_pipeline` asks of a pass. `requires` and `provides` name facts, checked before it runs."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    provides: ClassVar[frozenset[str]]

    def run(self, graph: fx.Graph, context: Context) -> PassResult: ...


def run_pipeline(passes: Iterable[Pass], graph: fx.Graph, context: Context) -> None:
    """Run `passes` in order over `graph`, recording each in `context.records`."""
    for step in passes:
        missing = step.requires - context.facts
        assert not missing, f"{step.name} requires {sorted(missing)}: run the pass that provides it first"
        started = time.perf_counter()
        result = step.run(graph, context)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        context.facts |= step.provides
        context.records.append(PassRecord(step.name, result.changed, elapsed_ms, result.skips))
    graph.eliminate_dead_code()
    graph.lint()
