"""Random numbers: every rank draws its own for its tokens, all draw the same for what they hold whole.

    dropout over tokens, attention of heads                   rank 0 drops features of its tokens, rank 1 others of its
    noise on what is whole, a module that is called whole     the same on all ranks, however they are seeded

A step draws from the default generator no more than its seeds, and every operation from a stream of one of them:

    own seed       this rank's draw + rank * SPACING       apart, also where all ranks are seeded alike
    shared seed    rank 0's draw, by an all-reduce         only in graphs that need it
    operation k    draws from seed + k * P * SPACING

So a run is reproducible from one seed, and the generators are as far along on every rank afterwards. Seeds are values
of the graph: what runs again in the backward draws again what it drew before, compiled or not.
Which operation gets which is the matter of `passes/seed_random_operations.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.axis import Axis
from surgery.errors import InputError
from surgery.rules.call import bind_schema

RANDOM = torch.Tag.nondeterministic_seeded
OFF = {"dropout": 0.0, "dropout_p": 0.0, "p": 0.0, "train": False, "training": False}
"""Arguments of random operators with which they draw nothing."""
SEEDS = 2**32  # the CPU generator reads 32 bits of a seed
SPACING = 0x9E3779B1  # odd, so that no two of 2**32 streams have the same seed


def draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an operator draws random numbers."""
    if RANDOM not in operator.tags:
        return False
    given = bind_schema(operator, args, kwargs)
    return not any(isinstance(given.get(name), (bool, int, float)) and given[name] == off for name, off in OFF.items())


@torch.library.custom_op("surgery::draw_seed", mutates_args=(), tags=(RANDOM,))
def draw_seed() -> Tensor:
    """One draw of the CPU's default generator: an integer [] below `SEEDS`."""
    return torch.randint(SEEDS, (), device="cpu")


@draw_seed.register_fake
def _() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def own_seed(*, axis: Axis) -> Tensor:
    """The seed of what this rank draws in a step for its tokens."""
    return torch.ops.surgery.draw_seed() + axis.rank * SPACING


def seed_addend(device: torch.device, *, axis: Axis) -> Tensor:
    """This rank's addend of the seed that all share: of rank 0 its draw, of the others 0. All draw."""
    drawn = torch.ops.surgery.draw_seed()
    return (drawn if axis.rank == 0 else torch.zeros_like(drawn)).to(device)


def seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` behind a seed: it draws from one stream of it, as from the default generators."""
    schema = getattr(function, "_schema", None)
    name = str(schema.name).rsplit("::", 1)[-1] if schema is not None else function.__name__

    def run(seed: Tensor, *args: Any, stream: int, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise InputError(
                f"{name} draws random numbers, which under torch.compile would be the same on every rank, or in every "
                "step. Expected none but hidden dropout (config.attention_dropout=0.0), or an uncompiled model."
            )
        with drawn_from(_seed_of(seed, stream), _device_of(args, kwargs)):
            return function(*args, **kwargs)

    run.__name__ = run.__qualname__ = name
    return run


def _seed_of(seed: Tensor, stream: int) -> int:
    return (int(seed) + stream * SPACING) % SEEDS


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where a random operation draws: where it is told to, or where its first tensor is."""
    first = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
    return torch.device(kwargs.get("device") or (first.device if first is not None else "cpu"))


@contextmanager
def drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """Let the default generators draw from `seed` while the block runs; afterwards they are where they were."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def rank_stream(rank: int, device: torch.device) -> Iterator[None]:
    """Draw from a stream of this rank's own while the block runs."""
    seed = int(torch.ops.surgery.draw_seed()) + rank * SPACING
    with drawn_from(seed % SEEDS, device):
        yield


@torch.library.custom_op("surgery::dropout_mask", mutates_args=())
def dropout_mask(like: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """Which elements are kept: a boolean tensor of the shape of `like`, True with probability 1 - p."""
    generator = torch.Generator(like.device).manual_seed(_seed_of(seed, stream))
    return torch.rand(like.shape, device=like.device, generator=generator) >= p


@dropout_mask.register_fake
def _(like: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    return torch.empty_like(like, dtype=torch.bool)


def dropout(seed: Tensor, input: Tensor, p: float, train: bool, *, stream: int) -> Tensor:  # noqa: A002  (ATen's name)
    """`torch.nn.functional.dropout` behind a seed, in terms that compile."""
    return native_dropout(seed, input, p, train, stream=stream)[0]


def native_dropout(
    seed: Tensor,
    input: Tensor,  # noqa: A002
    p: float,
    train: bool | None,
    *,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """The same for ATen's `native_dropout`, which also returns what it kept."""
    kept = torch.ops.surgery.dropout_mask(input, p, seed, stream)
    return input * kept / (1 - p) if p < 1.0 else input * 0.0, kept


SEEDED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.dropout.default: dropout,
    torch.ops.aten.native_dropout.default: native_dropout,
}
