"""Fixtures: worlds of four and of two gloo ranks, each started once, when a test first asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a hub

import pytest
import torch

from surgery.verify.ranks import RankPool
from tests.worlds import World

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(world_size=4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair() -> Iterator[RankPool]:
    """Half the processes, and half the time, for what is shown at P = 2 alone."""
    pool = RankPool(world_size=2)
    yield pool
    pool.close()


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.sweep)], ids="{}-ranks".format)
def world(request: pytest.FixtureRequest) -> World:
    """Two ranks, and with `make test-all` also four."""
    size: int = request.param
    return World(request.getfixturevalue({2: "pair", 4: "ranks"}[size]), size)
