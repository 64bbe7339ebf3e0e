"""What `tests/test_cuda.py` runs on every rank. The ranks share one GPU, and gloo carries their tensors on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from surgery import restore, transform
from surgery.verify.comparison import compare, gradients_of
from surgery.verify.staging import staged_through_host
from tests.zoo import make_batch, make_model

DEVICE = "cuda"
HEAD_SIZE: dict[str, Any] = {"head_dim": 64}
"""What all kernels take; flex takes no fewer than 16."""


def to_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in batch.items()}


@mock.patch.object(torch.backends.cudnn, "allow_tf32", False)
@staged_through_host()
def prove_kernel(
    name: str, sp_size: int, implementation: str, batch: dict[str, Any], *, is_compiled: bool = False, **changes: Any
) -> dict[str, float]:
    """The errors in float32 against the unsharded model with the same kernel."""
    torch._dynamo.reset()
    model = make_model(name, attn_implementation=implementation, **{**HEAD_SIZE, **changes}).to(DEVICE)
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=True) if is_compiled else None
    return compare(model, sp_size, to_gpu(batch), run=compiled)


@staged_through_host()
def rounding(
    name: str, sp_size: int, implementation: str, batch: dict[str, Any], **changes: Any
) -> tuple[float, float]:
    """How far all gradients in bfloat16 are from those in float32: of the unsharded model, and of the sharded one."""
    torch._dynamo.reset()
    changes, batch = {**HEAD_SIZE, **changes}, to_gpu(batch)
    exact = make_model(name, attn_implementation="eager", **changes).to(DEVICE)
    expected = gradients(exact, batch)
    model = make_model(name, dtype=torch.bfloat16, attn_implementation=implementation, **changes)
    model.load_state_dict(exact.state_dict())
    model = model.to(DEVICE)
    whole = distance(gradients(copy.deepcopy(model), batch), expected)
    transform(model, sp_size, example=batch)
    sharded = distance(gradients(model, batch), expected)
    restore(model)
    return whole, sharded


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Every parameter's, of one forward and backward, averaged over the ranks of a transformed model."""
    options = {} if hasattr(model, "surgery") else {"use_cache": False}
    model(**batch, **options).loss.backward()
    group = model.surgery.mpu.get_sequence_parallel_group() if hasattr(model, "surgery") else None
    return {name: gradient.double() for name, gradient in gradients_of(model, group).items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Euclidean, over all parameters, relative to the length of what is expected."""
    missed = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    return float((missed / sum(float(value.square().sum()) for value in expected.values())) ** 0.5)


@staged_through_host()
def drawn(sp_size: int, seed: int, change: Callable[[Any], None] = lambda model: None) -> dict[str, Tensor]:
    """The gradients under attention dropout, of a model changed before its step."""
    model = make_model("llama", attention_dropout=0.25, **HEAD_SIZE).to(DEVICE)
    change(model)
    transform(model, sp_size)
    torch.manual_seed(seed)
    found = gradients(model, to_gpu(make_batch(2, 32)))
    restore(model)
    return {name: gradient.cpu() for name, gradient in found.items()}


def checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing_enable()  # type: ignore[operator]
