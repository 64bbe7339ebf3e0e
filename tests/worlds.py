"""What the fixture `world` gives a test: ranks of one sequence-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.verify.ranks import RankPool


@dataclass(frozen=True)
class World:
    """The ranks, and how many there are."""

    pool: RankPool
    sp_size: int

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What `function` returns on every rank."""
        return self.pool.run(function, *args, **kwargs)
