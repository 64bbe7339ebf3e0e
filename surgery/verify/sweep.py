"""The sweep: every text architecture of the installed transformers, shrunk, run whole and sharded.

    catalog  --shrink-->  tiny models  --a process for each core, P simulated ranks in it-->  coverage.jsonl, .md

The ranks of an architecture are threads, which share one capture: `surgery verify` is the proof by real processes.
Results are written as they come; a sweep that was stopped goes on where it was. An architecture that kills its process,
or hangs, costs that process and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import in_one_line
from surgery.verify.catalog import Architecture, list_architectures
from surgery.verify.ranks import RankPool, RanksFailedError, RanksLostError
from surgery.verify.shrink import shrink
from surgery.verify.trial import UNRUNNABLE, Outcome, try_model, unanswered

TIMEOUT_S = 480


@dataclass(frozen=True)
class Row:
    """One architecture and what came of its trials: with which `revision` of this package, on what `device`."""

    architecture: Architecture
    outcomes: tuple[Outcome, ...]
    revision: str = ""
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        outcomes = [outcome.to_dict() for outcome in self.outcomes]
        told = {"revision": self.revision, "device": self.device}
        return {**asdict(self.architecture), **told, "outcomes": outcomes}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Row:
        architecture = Architecture(facts["task"], facts["class_name"], facts["model_type"])
        outcomes = tuple(Outcome(**outcome) for outcome in facts["outcomes"])
        return cls(architecture, outcomes, facts["revision"], facts.get("device", "cpu"))


def try_architecture(architecture: Architecture, sp_size: int, kinds: list[str], device: str) -> list[dict[str, Any]]:
    """What a process does for one architecture."""
    try:
        config = architecture.as_decoder(shrink(architecture.default_config(), sp_size))
    except Exception as error:
        return [Outcome(kind, UNRUNNABLE, f"no configuration: {in_one_line(error)}").to_dict() for kind in kinds]
    return [outcome.to_dict() for outcome in try_model(architecture.make, config, sp_size, kinds, device)]


class Workers:
    """One process for each thread, replaced when it is lost."""

    def __init__(self, sp_size: int, kinds: Sequence[str], device: str) -> None:
        self.sp_size, self.kinds, self.device = sp_size, list(kinds), device
        self._own = threading.local()
        self._open: set[RankPool] = set()

    def try_(self, architecture: Architecture) -> Row:
        pool = getattr(self._own, "pool", None)
        if pool is None:
            pool = self._own.pool = RankPool(1, timeout_s=TIMEOUT_S)
            self._open.add(pool)
        try:
            by_rank = pool.run(try_architecture, architecture, self.sp_size, self.kinds, self.device)
        except (RanksLostError, RanksFailedError) as error:
            self._own.pool = None
            self._open.discard(pool)
            pool.close()
            return Row(architecture, tuple(unanswered(kind, error) for kind in self.kinds))
        return Row(architecture, tuple(Outcome(**facts) for facts in by_rank[0]))

    def close(self) -> None:
        for pool in self._open:
            pool.close()


def sweep(
    path: Path,
    architectures: Iterable[Architecture],
    sp_size: int,
    kinds: Sequence[str],
    *,
    again: str | None = None,
    device: str = "cpu",
) -> Iterator[Row]:
    """Run what `path` has no results of yet, adding each to it; yields the new rows as they come.

    `again` matches the outcomes that count as none, besides those of another device.
    """
    known = {row.architecture for row in read_rows(path) if not _is_due(row, again, device)}
    workers = Workers(sp_size, kinds, device)
    count, revision = os.cpu_count() or 1, current_revision()
    try:
        with ThreadPoolExecutor(count) as threads:
            pending = [threads.submit(workers.try_, each) for each in architectures if each not in known]
            for done in as_completed(pending):
                row = replace(done.result(), revision=revision, device=device)
                with path.open("a") as file:
                    file.write(_line(row))
                yield row
    finally:
        workers.close()


def current_revision() -> str:
    """The commit that this package is at, short; "" where it is not in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _is_due(row: Row, again: str | None, device: str) -> bool:
    if row.device != device:
        return True
    return again is not None and any(re.search(again, outcome.verdict) for outcome in row.outcomes)


def _line(row: Row) -> str:
    return json.dumps(row.to_dict()) + "\n"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Leave one line for each architecture."""
    path.write_text("".join(map(_line, rows)))


def read_rows(path: Path) -> list[Row]:
    """The results so far, in the order of the catalog; of an architecture tried twice the last one."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {row.architecture: row for row in (Row.from_dict(json.loads(line)) for line in lines)}
    order = {architecture: i for i, architecture in enumerate(list_architectures())}
    return sorted(rows.values(), key=lambda row: order.get(row.architecture, len(order)))
