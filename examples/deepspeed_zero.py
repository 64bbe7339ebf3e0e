"""Train under DeepSpeed, in each stage of ZeRO, beside the unsharded model on one process.

    torchrun --nproc-per-node 2 examples/deepspeed_zero.py
    torchrun --nproc-per-node 4 examples/deepspeed_zero.py --sp-size 2 --stages 3

All that DeepSpeed is told of sequence parallelism is `mpu=model.surgery.mpu`. The learning rate is high and nothing is
clipped: gradients that were off by a factor would show at the second step.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import warnings
from typing import Any

import deepspeed
import torch
from launch import join_ranks
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import transform

TOLERANCE = 1e-5
SEQUENCES, LENGTH = 4, 512
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)


def main() -> None:
    options = parse_options()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of collectives that DeepSpeed calls by their old names
    with join_ranks() as ranks:
        torch.manual_seed(0)
        original: nn.Module = LlamaForCausalLM(CONFIG)
        original.to(ranks.device)
        batches = torch.randint(CONFIG.vocab_size, (options.steps, SEQUENCES, LENGTH), device=ranks.device)
        expected, weights = train_unsharded(copy.deepcopy(original), batches)

        model = transform(original, options.sp_size or ranks.world_size)
        worst = 0.0
        table = make_table("stage", "last loss", "losses off by", "weights off by", "numbers held")
        table.add_row("unsharded", f"{expected[-1]:.6f}", "", "", f"{len(weights):,}")
        for stage in options.stages:
            engine = initialize(copy.deepcopy(model), stage)  # the copies share the graph: it is captured once
            losses = train(engine, batches)
            held = sum(numbers_held(parameter) for parameter in engine.module.parameters())
            differences = relative(losses, expected), relative(whole_weights(engine), weights)
            engine.destroy()
            worst = max(worst, *differences)
            found = (f"{difference:.1e}" for difference in differences)
            table.add_row(f"ZeRO {stage}", f"{losses[-1]:.6f}", *found, f"{held:,}")
        ranks.console.print(table)
        ranks.console.print(f"The largest relative difference is {worst:.1e}; {TOLERANCE:.0e} is allowed.")
        if not worst <= TOLERANCE:
            sys.exit(1)


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def initialize(model: Any, stage: int) -> Any:
    """A DeepSpeed engine. Its batch size counts sequences of one replica, however many ranks share them."""
    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES // model.surgery.mpu.get_data_parallel_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000},
        "zero_allow_untested_optimizer": True,  # SGD
    }
    engine, *_ = deepspeed.initialize(
        model=model, config=config, mpu=model.surgery.mpu, optimizer=make_optimizer(model)
    )
    return engine


def train(engine: Any, batches: Tensor) -> Tensor:
    """The loss of each step, over the sequences of all replicas."""
    mpu = engine.module.surgery.mpu
    losses = []
    for batch in batches:
        ids = batch.chunk(mpu.get_data_parallel_world_size())[mpu.get_data_parallel_rank()]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    total = torch.stack(losses)
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def train_unsharded(model: Any, batches: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each step, and the weights after the last."""
    optimizer = make_optimizer(model)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), flat(model)


def whole_weights(engine: Any) -> Tensor:
    """All weights, one after the other, also where ZeRO 3 has left this rank only its share."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return flat(engine.module)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def numbers_held(parameter: Any) -> int:
    """What this rank holds of a parameter between steps."""
    return parameter.numel() or parameter.ds_tensor.numel()


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def make_table(*headings: str) -> Table:
    table = Table(
        title="DeepSpeed, and what one rank holds between steps", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train under DeepSpeed beside the unsharded model.")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="stages of ZeRO (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (%(default)s)")
    parser.add_argument("--sp-size", type=int, help="ranks that share a sequence; by default all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
