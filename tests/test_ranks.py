"""A world of ranks: one that fails is heard, also while the others wait for it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch.distributed as dist

from surgery.verify import ranks
from surgery.verify.ranks import RankPool, RanksLostError


def _fail_on_the_second() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such file")
    dist.barrier()


def test_the_failure_that_the_others_wait_for_is_told() -> None:
    pool = RankPool(world_size=2)
    with mock.patch.object(ranks, "GRACE_S", 1), pytest.raises(RanksLostError, match=r"(?s)ranks .0.*no such file"):
        pool.run(_fail_on_the_second)
    with pytest.raises(RanksLostError, match="lost before"):
        pool.run(dist.get_rank)
    pool.close()
