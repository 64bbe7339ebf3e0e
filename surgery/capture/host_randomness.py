"""Random numbers that no graph can draw: those of Python's and numpy's generators.

if random.random() < 0.1: skip the layer      a graph would skip it in every step, or in none
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from surgery.errors import UnsupportedOperationError


@contextmanager
def refused_host_randomness(where: str) -> Iterator[None]:
    """Raise `UnsupportedOperationError` if the block draws from one of these generators; `where` says what it runs."""
    before = _states()
    yield
    if _states() != before:
        raise UnsupportedOperationError(
            f"{where} draws from the generator of Python or numpy, and a graph would keep the number that it was "
            "captured with. Expected random numbers of torch. Use torch.rand() and the like."
        )


def _states() -> tuple[object, bytes]:
    return random.getstate(), pickle.dumps(np.random.get_state())
