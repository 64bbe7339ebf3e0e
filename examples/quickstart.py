"""Transform a model, read what was done to it, and see that loss and gradients are those of the unsharded model.

torchrun --nproc-per-node 2 examples/quickstart.py
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from launch import join_ranks
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import transform

TOLERANCE = 1e-5
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
        reference: nn.Module = LlamaForCausalLM(CONFIG)
        reference.to(ranks.device)
        ids = torch.randint(CONFIG.vocab_size, (2, 256), device=ranks.device)

        model = transform(copy.deepcopy(reference), sp_size=ranks.world_size)
        ranks.console.print(model.surgery.report())

        expected = reference(input_ids=ids, labels=ids)
        expected.loss.backward()
        found = model(input_ids=ids, labels=ids)  # the same whole batch on every rank
        found.loss.backward()
        average_gradients(model)

        logits = model.surgery.gather(found.logits)  # [B, S/P, V] -> [B, S, V]
        values = {"loss": (expected.loss, found.loss), "logits": (expected.logits, logits)}
        gradients = paired_gradients(reference, model)
        ranks.console.print(
            "", comparison(values, gradients, f"1 rank and {ranks.world_size}, the same 2 x 256 tokens")
        )

        worst = max(difference(*pair) for pair in (*values.values(), *gradients.values()))
        ranks.console.print(f"Largest difference over all {len(gradients)} gradients, loss and logits: {worst:.1e}")
        if worst > TOLERANCE:
            sys.exit(1)


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the ranks, as DDP does."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def paired_gradients(reference: nn.Module, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The unsharded and the sharded gradient of every parameter."""
    pairs = {}
    for name, parameter in model.named_parameters():
        expected, found = reference.get_parameter(name).grad, parameter.grad
        assert expected is not None
        assert found is not None
        pairs[name] = expected, found
    return pairs


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def comparison(
    values: dict[str, tuple[Tensor, Tensor]], gradients: dict[str, tuple[Tensor, Tensor]], title: str
) -> Table:
    """Norms side by side: of the outputs, and of the gradients outside the layers and in the first layer."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("norm of", no_wrap=True)
    for heading in ("unsharded", "sharded", "difference"):
        table.add_column(heading, justify="right")
    shown = {name: pair for name, pair in gradients.items() if "layers" not in name or ".layers.0." in name}
    for prefix, section in (("", values), ("∇ ", shown)):
        for name, (expected, found) in section.items():
            norms = (f"{tensor.double().norm():.6f}" for tensor in (expected, found))
            table.add_row(prefix + name.removesuffix(".weight"), *norms, f"{difference(expected, found):.1e}")
    return table


if __name__ == "__main__":
    main()
