"""Fixtures: worlds of four and of two gloo ranks, which tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a hub

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from surgery.verify.ranks import RankPool
from tests.worlds import World

torch.set_num_threads(1)


class Pools:
    """Worlds by their size, each started when it is first asked for, and again when it has lost a rank."""

    def __init__(self) -> None:
        self._by_size: dict[int, RankPool] = {}

    def of(self, size: int) -> RankPool:
        if size in self._by_size and self._by_size[size].is_lost:
            self._by_size.pop(size).close()
        if size not in self._by_size:
            self._by_size[size] = RankPool(world_size=size)
        return self._by_size[size]

    def close(self) -> None:
        for pool in self._by_size.values():
            pool.close()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def ranks(pools: Pools) -> RankPool:
    return pools.of(4)


@pytest.fixture
def pair(pools: Pools) -> RankPool:
    """Half the processes, and half the time, for what is shown at P = 2 alone."""
    return pools.of(2)


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """Four ranks of which the first alone exists: collectives return at once. For what needs no numbers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.sweep)], ids="{}-ranks".format)
def world(request: pytest.FixtureRequest, pools: Pools) -> World:
    """Two ranks, and with `make test-all` also four."""
    return World(pools.of(request.param), request.param)
