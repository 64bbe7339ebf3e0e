"""Ranks forked from a process that has captured: one capture instead of P, and the collectives of real processes.

    model, captured as rank 0 of P  --fork-->  P ranks, joined by gloo: each moves the graphs to its rank, and runs them

Only where a process that has computed may be forked: on Linux, without a GPU, whose runtime does not survive a fork,
nor do the threads that autograd starts for it. Elsewhere every rank captures. The transform itself knows no process
group here: that ranks agree on its options, and which engines it takes, `tests/` shows.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping
from typing import Any

import torch

from surgery.errors import SurgeryError
from surgery.mesh import make_mesh
from surgery.verify.comparison import Reference, largest, run_sharded
from surgery.verify.ranks import RankPool, RanksFailedError

TIMEOUT_S = 300
"""What ranks may take for one batch: seconds, but for a side of a branch on data, which each captures that takes it."""


def can_fork() -> bool:
    """Whether ranks can be forked from this process after it has captured."""
    return sys.platform == "linux" and not torch.accelerator.is_available()


def run_forked(model: Any, reference: Reference, batch: Mapping[str, Any]) -> dict[str, float]:
    """`run_sharded` for a model transformed without a process group: the largest of its ranks' errors, by name."""
    model.surgery.prepare(**batch)
    context = multiprocessing.get_context("fork")
    pool = RankPool(model.surgery.options.sp_size, TIMEOUT_S, context, given=(model, reference, batch))
    try:
        by_rank = pool.run(_run_on_this_rank)
    except RanksFailedError as error:
        if error.refusal is not None:
            raise SurgeryError(error.refusal) from error
        raise
    finally:
        pool.close()
    return {name: largest(errors[name] for errors in by_rank) for name in by_rank[0]}


def _run_on_this_rank(model: Any, reference: Reference, batch: Mapping[str, Any]) -> dict[str, float]:
    mesh = make_mesh(model.surgery.options.sp_size)
    assert mesh is not None
    model.surgery.move_to_rank(mesh)
    return run_sharded(model, reference, batch)
