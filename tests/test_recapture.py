"""A graph serves the calls that it was captured for, and no others: what differs is captured anew, and stays apart."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import restore, transform
from tests.proof import assert_calls_exact, prove_calls
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.settings = {"scales": [1.0, 1.0]}
        self.dtype: torch.dtype | None = None


class ByContainer(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) * self.settings["scales"][1])


class ByDtype(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) if self.dtype is None else self.inner(x).to(self.dtype).to(x.dtype))


class ByMode(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) * torch.tensor([2.0] if self.training else [0.5]))


class ByBatchSize(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) * 2 if x.shape[0] > 4 else self.inner(x))


class ByLength(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) * torch.tensor([2.0 if x.shape[1] > 20 else 0.5]))


class ByLengthOfOne(ByLength):
    """The same for a batch of one, whose size is no symbol."""


def set_scale(scale: float, model: Any) -> None:
    model.model.layers[0].mlp.settings["scales"][1] = scale


def set_dtype(dtype: torch.dtype | None, model: Any) -> None:
    model.model.layers[0].mlp.dtype = dtype


def set_mode(is_training: bool, model: Any) -> None:
    model.train(is_training)


def leave(model: Any) -> None:
    pass


CALLS: dict[type[Wrapped], list[tuple[Any, tuple[int, int]]]] = {
    ByContainer: [(partial(set_scale, scale), (2, 16)) for scale in (1.0, 0.5, 1.0)],
    ByDtype: [(partial(set_dtype, dtype), (2, 16)) for dtype in (None, torch.float64, torch.float16, None)],
    ByMode: [(partial(set_mode, is_training), (2, 16)) for is_training in (True, False, True)],
    ByBatchSize: [(leave, (batch_size, 16)) for batch_size in (2, 6, 3, 5)],
    ByLength: [(leave, (2, length)) for length in (16, 24, 17)],
    ByLengthOfOne: [(leave, (1, length)) for length in (16, 24, 17)],
}
NUM_PROGRAMS = dict.fromkeys(CALLS, 2) | {ByDtype: 3}


def _prove(wrapped: type[Wrapped], sp_size: int) -> Any:
    model = make_model("llama")
    model.model.layers[0].mlp = wrapped(model.model.layers[0].mlp)
    return prove_calls(model, sp_size, [(change, make_batch(*sizes)) for change, sizes in CALLS[wrapped]])


@pytest.mark.parametrize("wrapped", sampled(CALLS, {ByMode, ByDtype}))
def test_what_differs_is_captured_anew(world: World, wrapped: type[Wrapped]) -> None:
    assert_calls_exact(world.run(_prove, wrapped, world.sp_size), NUM_PROGRAMS[wrapped])


def test_a_trace_leaves_no_hooks() -> None:
    """transformers records outputs by hooks that the first forward installs: once, also after two traces."""
    model = transform(make_model("mixtral", output_router_logits=True), 2)
    batch = make_batch(2, 8)
    outputs = dict(model.eval().surgery.prepare(**batch).outputs)
    assert [name for name in outputs if name.startswith("router_logits")] == ["router_logits.0"]
    restore(model)
    recorded = model(**batch, output_hidden_states=True)
    assert (len(recorded.hidden_states), len(recorded.router_logits)) == (2, 1)


def test_recorders_are_no_other_model() -> None:
    """The original forward installs them, beside a graph that was captured before."""
    model = transform(make_model("llama"), 2, disable_in_eval=True)
    batch = make_batch(2, 8)
    model.eval()(**batch)
    model.train().surgery.prepare(**batch)
    assert len(model.surgery.programs) == 1
