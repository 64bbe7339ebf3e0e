"""Functions with a backward of their own: let through where it is the derivative, told apart where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers.models.bloom.modeling_bloom import GeLUFunction

from surgery import UnsupportedOperationError, transform
from surgery.capture.custom_backward import is_derivative
from surgery.verify.comparison import compare
from tests.proof import assert_exact
from tests.worlds import World
from tests.zoo import make_batch, make_model


class Square(Function):
    """Written with a context of its own step, as newer functions are."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


class StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Clipped(Function):
    """The identity, whose gradient is cut off at 10."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(-10, 10)


@pytest.mark.parametrize("cls", [GeLUFunction, Square])
def test_a_derivative_is_recognised(cls: type[Function]) -> None:
    assert is_derivative(cls, (torch.ones(2, 5),), cls.apply)


@pytest.mark.parametrize("cls", [StraightThrough, Clipped])
def test_anything_else_is_not(cls: type[Function]) -> None:
    assert not is_derivative(cls, (torch.ones(2, 5),), cls.apply)


@torch.library.custom_op("planted::normalized_gradient", mutates_args=())
def normalized_gradient(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("planted::halved_gradient", mutates_args=())
def halved_gradient(x: Tensor) -> Tensor:
    return x.clone()


for operator, backward in (
    (normalized_gradient, lambda context, g: g / (g.norm() + 1e-9)),
    (halved_gradient, lambda context, g: g / 2),
):
    operator.register_fake(torch.empty_like)
    operator.register_autograd(backward)


class Calling(nn.Module):
    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x + getattr(torch.ops.planted, self.name)(x)))


def make_calling(name: str) -> Any:
    model = make_model("llama")
    model.model.layers[0].mlp = Calling(model.model.layers[0].mlp, name)
    return model


def _prove_halved(sp_size: int) -> dict[str, float]:
    return compare(make_calling("halved_gradient"), sp_size, make_batch(2, 13))


def test_an_operator_with_a_linear_backward_is_exact(world: World) -> None:
    assert_exact(world.run(_prove_halved, world.sp_size))


def test_one_with_another_backward_is_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"normalized_gradient.* at model.layers.0.mlp .*not linear"):
        transform(make_calling("normalized_gradient"), 2)
