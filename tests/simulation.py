"""All ranks in one process: the package's own, which the sweep runs on too."""

from __future__ import annotations

from surgery.simulation import run_ranks as run_ranks
from surgery.simulation import simulated_ranks as simulated_ranks
