"""On a GPU: the kernels that a CPU does not have. `make test-cuda` runs this file, `make test` does not.

The ranks share one GPU, and gloo carries their tensors on the host. NCCL takes one rank a GPU, and is tried with one.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from surgery.axis import Axis
from surgery.collectives import all_reduce, gather_runs
from surgery.private import GroupName, all_to_all_runs
from tests import cuda
from tests.batches import packed, padded
from tests.proof import assert_exact
from tests.worlds import World
from tests.zoo import make_batch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
MOST_COARSENING = 1.2
"""How much more a sharded model may round. Its sums have another order: it is now above the other, now below."""


def left_padded() -> dict[str, Any]:
    """No padding predicts the token after it: what attention gives where nothing is seen, each kernel has its own."""
    batch = padded("left")
    first = batch["attention_mask"].argmax(dim=1, keepdim=True)
    return {**batch, "labels": batch["labels"].scatter(1, first, -100)}


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: make_batch(2, 32),
    "odd": lambda: make_batch(2, 37),
    "left-padded": left_padded,
    "packed": lambda: packed((5, 20, 7)),
}
KERNELS = [
    ("llama", "sdpa"),
    ("llama", "flex_attention"),
    ("gemma2", "flex_attention"),
    ("gpt_oss", "flex_attention"),
    ("mixtral", "sdpa"),
    ("qwen3_next", "sdpa"),
    ("bloom", "eager"),
]


def has_flash(version: int) -> bool:
    """Whether the package is installed under this version's own name: flash-attn-4 is imported as flash_attn, too."""
    names = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}
    try:
        importlib.metadata.version(names[version])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# float32, against the unsharded model with the same kernel


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(("name", "implementation"), KERNELS)
def test_kernels_are_exact(world: World, name: str, implementation: str, kind: str) -> None:
    assert_exact(world.run(cuda.prove_kernel, name, world.sp_size, implementation, BATCHES[kind]()))


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_compiled_kernels_are_exact(world: World, implementation: str) -> None:
    batch = make_batch(2, 33)
    assert_exact(world.run(cuda.prove_kernel, "llama", world.sp_size, implementation, batch, is_compiled=True))


# bfloat16, against float32


def assert_no_coarser(results: list[tuple[float, float]]) -> None:
    for whole, sharded in results:
        assert 0 < whole < 0.1 and sharded <= MOST_COARSENING * whole, (whole, sharded)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_bfloat16_rounds_no_more(world: World, implementation: str, kind: str) -> None:
    assert_no_coarser(world.run(cuda.rounding, "llama", world.sp_size, implementation, BATCHES[kind]()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_rounds_no_more(world: World, version: int, kind: str, name: str) -> None:
    if not has_flash(version):
        pytest.skip(f"flash-attn {version} is not installed")
    batch = BATCHES[kind]()
    if kind == "packed":
        batch = {key: value[:1] for key, value in batch.items()}
    assert_no_coarser(world.run(cuda.rounding, name, world.sp_size, f"flash_attention_{version}", batch))


# random numbers


def test_attention_drops_by_the_seed(world: World) -> None:
    once, again, other, kept = (
        world.run(cuda.drawn, world.sp_size, *arguments)[0] for arguments in [(3,), (3,), (4,), (3, cuda.checkpointed)]
    )
    assert all(torch.equal(once[name], gradient) for name, gradient in again.items())
    assert cuda.distance(once, other) > 0.01
    assert cuda.distance(once, kept) < 1e-5, "recomputation draws the same"


# NCCL


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Axis]:
    """One rank over NCCL."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield Axis(1, 0, GroupName(dist.group.WORLD.group_name))
    dist.destroy_process_group()


COLLECTIVES: dict[str, Callable[[Tensor, Axis], Tensor]] = {
    "all-to-all": lambda x, axis: all_to_all_runs(x, [len(x)], [len(x)], axis.group_name),
    "gather": lambda x, axis: gather_runs(x, [len(x)], axis),
    "all-reduce": all_reduce,
}


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_over_nccl(alone: Axis, name: str, dtype: torch.dtype, is_compiled: bool) -> None:
    if name == "all-reduce" and dtype == torch.bool:
        pytest.skip("no sum of truth values is asked for")
    torch._dynamo.reset()
    x = torch.randn(6, 4, device="cuda").to(dtype).requires_grad_(dtype.is_floating_point or dtype.is_complex)
    function = torch.compile(COLLECTIVES[name], fullgraph=True) if is_compiled else COLLECTIVES[name]
    y = function(x, alone)
    assert torch.equal(y, x)
    if x.requires_grad:
        cotangent = torch.randn_like(x)
        assert torch.equal(torch.autograd.grad(y, x, cotangent)[0], cotangent)
