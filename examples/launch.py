"""What every example does first: join the ranks that torchrun started, choose a device, let rank 0 speak for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from rich.console import Console
from transformers.utils import logging

from surgery import SurgeryError

PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. `console` prints on rank 0 and is silent elsewhere."""

    rank: int
    world_size: int
    device: torch.device
    console: Console


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the process group for the duration of a `with` block; without torchrun, say how to launch and exit.

    An error that the user can mend is printed once, by rank 0, without a traceback.
    """
    if "RANK" not in os.environ:
        script = os.path.relpath(sys.argv[0])
        sys.exit(f"{script} runs on several ranks. Launch it with:\n\n    torchrun --nproc-per-node 2 {script}\n")
    device = _choose_device()
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=PATIENCE)
    rank = dist.get_rank()
    console = Console(quiet=rank != 0, highlight=False)
    if rank != 0:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield Ranks(rank, dist.get_world_size(), device, console)
    except (SurgeryError, OSError) as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}")
        sys.exit(1)
    finally:
        dist.destroy_process_group()


def _choose_device() -> torch.device:
    """A GPU of this rank's own if there are enough for all local ranks, else the CPU."""
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() < local_world_size:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
