"""Buffers that a forward writes: exact, where they are no state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import CaptureError, transform
from surgery.verify.comparison import compare
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model


class Writing(nn.Module):
    """An MLP that writes to a buffer, by `write`, before or after it reads it."""

    buffer: Tensor

    def __init__(self, inner: nn.Module, write: Any, *, is_saved: bool) -> None:
        super().__init__()
        self.inner, self.write = inner, write
        self.register_buffer("buffer", torch.ones(()), persistent=is_saved)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.buffer, x)
        return torch.as_tensor(self.inner(x) * self.buffer)


def count_tokens(buffer: Tensor, x: Tensor) -> None:
    buffer.copy_(torch.tensor(x.shape[1]))


def count_calls(buffer: Tensor, x: Tensor) -> None:
    buffer.add_(1)


def keep_mean(buffer: Tensor, x: Tensor) -> None:
    buffer.copy_(x.mean())


def make_writing(write: Any, *, is_saved: bool) -> Any:
    model = make_model("llama")
    model.model.layers[0].mlp = Writing(model.model.layers[0].mlp, write, is_saved=is_saved)
    return model


def _prove(sp_size: int, write: Any, is_saved: bool) -> dict[str, float]:
    return compare(make_writing(write, is_saved=is_saved), sp_size, make_batch(2, 13))


CASES = {
    "left out, as it follows from the inputs": (count_tokens, False),
    "written, as it is saved": (count_tokens, True),
    "written, as it tells of the model": (keep_mean, False),
}


@pytest.mark.parametrize("case", sampled(CASES, {"left out, as it follows from the inputs"}))
def test_written_before_it_is_read(world: World, case: str) -> None:
    """What is to be written is so by the module, which is called whole."""
    assert_exact(world.run(_prove, world.sp_size, *CASES[case]))


def test_state_is_refused() -> None:
    with pytest.raises(CaptureError, match="Writing"):
        transform(make_writing(count_calls, is_saved=False), 3)
