"""A script for DeepSpeed's Ulysses, before and after its one import is changed, beside the unsharded model.

torchrun --nproc-per-node 2 examples/migrate_from_deepspeed.py

`train` is the script, its loss as DeepSpeed's documentation computes it, on sequences of two packed documents. It runs
with surgery's classes and, where deepspeed is installed, with DeepSpeed's own, both under ZeRO 1. Without deepspeed,
gradients are averaged over the ranks by hand.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from launch import Ranks, join_ranks
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from surgery import ulysses

THEIRS = "deepspeed.runtime.sequence_parallel.ulysses_sp"
TOLERANCE = 1e-5
LENGTH, NUM_ROUNDS, RATE = 64, 2, 0.1
CONFIG = LlamaConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)
CHANGE = """\
[red]- from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter[/]
[green]+ from surgery.ulysses import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter[/]

  mpu = UlyssesSPAttentionHF.register_with_transformers(name, "sdpa", sequence_parallel_size, ...)
  model = AutoModelForCausalLM.from_pretrained(name)
  engine, *_ = deepspeed.initialize(model=model, mpu=mpu, ...)
  loader = UlyssesSPDataLoaderAdapter(loader, ...)
  for batch in loader:
      ...
"""
Steps = list[tuple[float, Tensor]]  # the loss of each step, and all weights after it


def main() -> None:
    warnings.filterwarnings("ignore", message=".*all_gather is deprecated.*")  # the documented loss calls it
    logging.disable_progress_bar()
    with join_ranks() as ranks, tempfile.TemporaryDirectory() as scratch:
        name = save_model(scratch)
        start = flat_weights(LlamaForCausalLM.from_pretrained(name))
        ranks.console.print(CHANGE, soft_wrap=True)
        runs = {"unsharded": train_unsharded(name, ranks), "after": train(ulysses, name, ranks)}
        ulysses.forget(name)
        deepspeed = find_deepspeed()
        if deepspeed is not None:  # last: its registration changes every model's attention
            runs["before"] = train(importlib.import_module(THEIRS), name, ranks)
        else:
            ranks.console.print("deepspeed is not installed: only the side after the change is run.\n")
        ranks.console.print(comparison(runs, start))
        (_, expected), (_, found) = runs["unsharded"][-1], runs["after"][-1]
        worst = ((found - expected).abs().max() / expected.abs().max()).item()
        ranks.console.print(f"surgery's weights in the end differ by {worst:.1e} from the unsharded model's.")
        if not worst <= TOLERANCE:
            sys.exit(1)


def train(classes: Any, name: str, ranks: Ranks) -> Steps:
    """The script, which does not know who made `classes`."""
    mpu = classes.UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=name,
        core_attn_implementation="sdpa",
        sequence_parallel_size=ranks.world_size,
        micro_batch_size=1,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(name)
    model.to(ranks.device).train()
    engine = make_engine(model, mpu)
    sp_group, sp_world_size = mpu.get_sequence_parallel_group(), mpu.get_sequence_parallel_world_size()
    loader = classes.UlyssesSPDataLoaderAdapter(
        [make_sample(ranks.world_size * index + ranks.rank) for index in range(NUM_ROUNDS)],
        sp_rank=mpu.get_sequence_parallel_rank(),
        sp_group=sp_group,
        sp_world_size=sp_world_size,
        device=ranks.device,
    )
    steps: Steps = []
    for batch in loader:
        on_device = {key: value.to(ranks.device) for key, value in batch.items()}
        outputs = engine(**on_device, use_cache=False)
        shift_labels = on_device["shift_labels"]
        loss = model.loss_function(
            logits=outputs.logits,
            labels=None,
            shift_labels=shift_labels,
            vocab_size=model.config.vocab_size,
        )
        losses_per_rank = torch.distributed.nn.functional.all_gather(loss, group=sp_group)
        good_tokens = (shift_labels != -100).view(-1).sum()
        good_tokens_per_rank = torch.distributed.nn.functional.all_gather(good_tokens, group=sp_group)
        total_loss = sum(losses_per_rank[rank] * good_tokens_per_rank[rank] for rank in range(sp_world_size))
        loss = total_loss / max(sum(good_tokens_per_rank), 1)
        engine.backward(loss)
        engine.step()
        steps.append((loss.item(), flat_weights(model)))
    return steps


def train_unsharded(name: str, ranks: Ranks) -> Steps:
    """One process on the same samples, one after the other."""
    model: Any = LlamaForCausalLM.from_pretrained(name)
    model.to(ranks.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps: Steps = []
    for index in range(NUM_ROUNDS * ranks.world_size):
        sample = {key: value.to(ranks.device) for key, value in make_sample(index).items()}
        loss = model(**sample, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), flat_weights(model)))
    return steps


def save_model(directory: str) -> str:
    """A small Llama with random weights, saved for all ranks to load by name."""
    names = [directory]
    dist.broadcast_object_list(names)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(CONFIG).save_pretrained(names[0])
    dist.barrier()
    return names[0]


def make_sample(index: int) -> dict[str, Tensor]:
    """Two documents of random tokens in one sequence; a prompt at the start of each has no labels."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(CONFIG.vocab_size, (1, LENGTH), generator=generator)
    first = LENGTH // 3
    positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions < 5, -100)}


def find_deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError:
        return None


def make_engine(model: nn.Module, mpu: Any) -> Any:
    deepspeed = find_deepspeed()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    if deepspeed is None:
        return AveragingEngine(model, optimizer)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,  # the default of 1.0 hides a factor in the gradients
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=mpu, config=config)
    return engine


class AveragingEngine:
    """The calls of a DeepSpeed engine, for gradients averaged over all ranks."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in model.parameters()])


def comparison(runs: dict[str, Steps], start: Tensor) -> Table:
    """The loss of each step, and the length of the first step in weights: the gradient's norm times the rate."""
    table = Table(title="Two packed documents a sequence, SGD", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("step")
    for run in runs:
        table.add_column(run, justify="right")
    for index, losses in enumerate(zip(*([loss for loss, _ in steps] for steps in runs.values()), strict=True)):
        table.add_row(f"loss {index}", *(f"{loss:.6f}" for loss in losses))
    norms = [((steps[0][1] - start).norm() / RATE).item() for steps in runs.values()]
    table.add_row("norm of the first gradient", *(f"{norm:.6f}" for norm in norms))
    return table


if __name__ == "__main__":
    main()
