"""Real ranks for tests: the package's own `RankPool`, one world for the whole run (`tests/conftest.py`)."""

from __future__ import annotations

from surgery.ranks import RankPool as RankPool
