"""Compile a transformed model into one graph that serves every batch and sequence length, and compare it with eager.

torchrun --nproc-per-node 2 examples/compile_model.py
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from launch import join_ranks
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import transform

TOLERANCE = 1e-5
SHAPES = ((2, 128), (2, 256), (4, 192), (3, 512), (2, 1024))  # [B, S]; torch compiles a batch of 1 on its own
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)


def main() -> None:
    with join_ranks() as ranks:
        torch.manual_seed(0)
        llama: nn.Module = LlamaForCausalLM(CONFIG)
        model = transform(llama.to(ranks.device), sp_size=ranks.world_size)
        compiled = torch.compile(model, fullgraph=True, dynamic=True)

        ranks.console.print("Compiling the first batch; the others use the same graph.\n")
        table = make_table()
        differences = []
        for batch_size, length in SHAPES:
            ids = torch.randint(CONFIG.vocab_size, (batch_size, length), device=ranks.device)
            expected, _ = run_step(model, ids)
            expected_gradients = flat_gradients(model)
            found, elapsed_s = run_step(compiled, ids)
            differences += [relative(expected, found), relative(expected_gradients, flat_gradients(model))]
            table.add_row(
                f"{batch_size} x {length}",
                *(f"{loss.item():.6f}" for loss in (expected, found)),
                *(f"{difference:.1e}" for difference in differences[-2:]),
                f"{elapsed_s:.2f} s",
                str(counters["stats"]["unique_graphs"]),
            )
            torch.compiler.set_stance("fail_on_recompile")  # from here on, compiling again is an error

        ranks.console.print(table)
        ranks.console.print(f"The largest difference is {max(differences):.1e}; {TOLERANCE:.0e} is allowed.")
        if not all(difference <= TOLERANCE for difference in differences):
            sys.exit(1)


def run_step(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """The loss after a forward and a backward, and the seconds they took."""
    model.zero_grad()
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), time.perf_counter() - start


def flat_gradients(model: Any) -> Tensor:
    """All of this rank's gradients, one after the other."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def relative(expected: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def make_table() -> Table:
    table = Table(title="One compiled graph, many shapes", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("batch", "eager loss", "compiled loss", "difference", "of gradients", "compiled step", "graphs"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


if __name__ == "__main__":
    main()
