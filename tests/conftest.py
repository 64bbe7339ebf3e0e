"""Fixtures: one world of four gloo ranks for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a hub

import pytest
import torch

from tests.ranks import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(world_size=4)
    yield pool
    pool.close()
