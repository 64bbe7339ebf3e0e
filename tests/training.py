"""Training beside an unsharded run: the same global batches, the same optimizer, and what is compared afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.verify.comparison import SMALLEST_SHARE, relative_error
from tests.zoo import make_batch, make_model

STEPS, ROWS, LENGTH, MICRO_STEPS = 5, 8, 32, 2
MAX_NORM = 0.5  # below the norms met here, so that clipping is at work
# Adam's step is g / (sqrt(v) + eps). Gradients that are zero in exact arithmetic are noise of some 1e-9 here; divided
# by its own size it would be a whole step in a random direction. An eps far above the noise leaves those weights where
# they are, and the steps of the others then differ by no more than their gradients do.
ADAM_EPS = 1e-3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=ADAM_EPS),
}

Batch = dict[str, Any]


class Trained(NamedTuple):
    """The whole gradients of the first step, their norm before clipping, and the weights at the end."""

    gradients: dict[str, Tensor]
    norm: float
    weights: dict[str, Tensor]


def model_to_train(**changes: Any) -> Any:
    return make_model("llama", num_hidden_layers=2, **changes)


def global_batch(step: int) -> tuple[Batch, int]:
    """A batch with labels uneven over rows and shards, and how many labels it has."""
    batch = make_batch(ROWS, LENGTH, seed=step)
    return batch, int((batch["labels"][:, 1:] != -100).sum())


def micro_batches(mpu: Any) -> Iterator[list[Batch]]:
    """A step's micro-batches of this rank's replica, each with the labels of the global batch over all replicas."""
    replicas, replica = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    for step in range(STEPS):
        batch, count = global_batch(step)
        runs = {name: tensor.chunk(replicas)[replica].chunk(MICRO_STEPS) for name, tensor in batch.items()}
        yield [
            {**{name: run[micro] for name, run in runs.items()}, "num_items_in_batch": count / replicas}
            for micro in range(MICRO_STEPS)
        ]


def train_unsharded(model: nn.Module, optimizer: str, *, clips: bool) -> Trained:
    """One process on the whole batches."""
    stepper = OPTIMIZERS[optimizer](model.parameters())
    found: list[tuple[dict[str, Tensor], float]] = []
    for step in range(STEPS):
        batch, count = global_batch(step)
        model(**batch, num_items_in_batch=count, use_cache=False).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM if clips else float("inf")))
        found.append((gradients, norm))
        stepper.step()
        stepper.zero_grad()
    return Trained(*found[0], {name: p.detach().clone() for name, p in model.named_parameters()})


def errors(found: Trained, expected: Trained) -> dict[str, float]:
    """The relative errors, each tensor's against at least a small share of the largest value there is."""
    return {
        "gradients": worst_error(found.gradients, expected.gradients),
        "norm": abs(found.norm - expected.norm) / expected.norm,
        "weights": worst_error(found.weights, expected.weights),
    }


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of any tensor, measured as `errors` does."""
    floor = SMALLEST_SHARE * max(float(value.abs().max()) for value in expected.values())
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], value, floor) for name, value in expected.items())
