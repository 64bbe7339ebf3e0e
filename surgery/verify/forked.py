"""Ranks forked from a process that has captured: one capture instead of P, and the collectives of real processes.

    model, captured as rank 0 of P  --fork-->  P ranks, joined by gloo: each makes the graph its own, and runs it

Only where a process may be forked that has computed: on Linux without a GPU. Elsewhere every rank captures.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping
from typing import Any

import torch

from surgery.errors import SurgeryError
from surgery.mesh import make_mesh
from surgery.verify.comparison import Reference, run_sharded
from surgery.verify.ranks import RankPool

TIMEOUT_S = 300


def can_fork() -> bool:
    return sys.platform == "linux" and not torch.cuda.is_available()


def run_forked(model: Any, reference: Reference, batch: Mapping[str, Any]) -> dict[str, float]:
    """`run_sharded` for a model transformed without a process group: the largest of its ranks' errors, by name."""
    model.surgery.prepare(**batch)
    context = multiprocessing.get_context("fork")
    pool = RankPool(model.surgery.options.sp_size, TIMEOUT_S, context, given=(model, reference, batch))
    try:
        by_rank = pool.run(_run_on_a_rank)
    finally:
        pool.close()
    for error in by_rank:
        if isinstance(error, Exception):
            raise error
    return {name: max(errors[name] for errors in by_rank) for name in by_rank[0]}


def _run_on_a_rank(model: Any, reference: Reference, batch: Mapping[str, Any]) -> dict[str, float] | Exception:
    """This rank's errors, or why there are none, as what an error carries may not travel between processes."""
    try:
        model.surgery.join(make_mesh(model.surgery.options.sp_size))
        return run_sharded(model, reference, batch)
    except SurgeryError as error:
        return SurgeryError(str(error))
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")
