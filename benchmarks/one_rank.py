"""What is left of a training step on one rank of P: its peak memory and its computation, on one GPU.

    python benchmarks/one_rank.py --sp-sizes 2 4 8 --lengths 16384 65536

The other ranks are torch's fake process group: what they would send is allocated and never filled. Sizes and times of
computation are those of one rank, numbers are not, and communication takes no time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import restore, transform

DEVICE = "cuda"
GIB = 2**30
REPEATS = 3
HEADINGS = ("tokens", "ranks", "above weights, gradients", "of unsharded", "forward + backward", "of unsharded")
CONFIG = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=2**20,
)


@dataclass(frozen=True)
class Step:
    """One rank's: peak memory above weights and gradients, and the median time of a forward and a backward."""

    activations_gib: float
    seconds: float


def main() -> None:
    options = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("this benchmark asks CUDA's allocator for its peak: it needs a GPU")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(CONFIG).bfloat16()
    model.gradient_checkpointing_enable()
    cases = [(length, sp_size) for length in options.lengths for sp_size in (1, *options.sp_sizes)]
    steps = {case: measure(model, *case) for case in track(cases, console=Console(stderr=True))}
    weights_gib = sum(parameter.nbytes for parameter in model.parameters()) / GIB
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a Llama of {weights_gib:.1f} GiB in bfloat16"
    Console(width=100).print(make_table(title, steps))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sp-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384, 65_536])
    return parser.parse_args()


def measure(model: Any, length: int, sp_size: int) -> Step | None:
    """Steps of one rank of `sp_size`, or of the unsharded model where that is 1; None where they do not fit."""
    ids = torch.randint(CONFIG.vocab_size, (1, length), device=DEVICE)
    try:
        with sharded(model, sp_size, ids) if sp_size > 1 else nullcontext():
            return run_steps(model, ids)
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()


def run_steps(model: Any, ids: torch.Tensor) -> Step:
    peaks, times_s = [], []
    for _ in range(1 + REPEATS):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start_s = torch.cuda.memory_allocated(), time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.cuda.synchronize()
        times_s.append(time.perf_counter() - start_s)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return Step(statistics.median(peaks[1:]) / GIB, statistics.median(times_s[1:]))


@contextmanager
def sharded(model: Any, sp_size: int, ids: torch.Tensor) -> Iterator[None]:
    """Within the block the model is that of the first of `sp_size` ranks, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sp_size)
    try:
        transform(model, sp_size, check_inputs="never", example={"input_ids": ids, "labels": ids})
        try:
            yield
        finally:
            restore(model)
    finally:
        dist.destroy_process_group()


def make_table(title: str, steps: dict[tuple[int, int], Step | None]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    last = max(sp_size for _, sp_size in steps)
    for (length, sp_size), step in steps.items():
        name = "unsharded" if sp_size == 1 else str(sp_size)
        table.add_row(f"{length:,}", name, *make_cells(step, steps[length, 1]), end_section=sp_size == last)
    return table


def make_cells(step: Step | None, whole: Step | None) -> list[str]:
    if step is None:
        return ["out of memory"]
    memory, duration = f"{step.activations_gib:.2f} GiB", f"{step.seconds:.3f} s"
    if whole is None:
        return [memory, "", duration]
    share = f"{step.activations_gib / whole.activations_gib:.3f}"
    return [memory, share, duration, f"{step.seconds / whole.seconds:.3f}"]


if __name__ == "__main__":
    main()
