"""Functions with a backward of their own: let through where it is the derivative, told apart where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from transformers.models.bloom.modeling_bloom import GeLUFunction

from surgery.custom_backward import is_derivative


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
    assert is_derivative(cls, (torch.ones(2, 5),), Function.apply.__func__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", [StraightThrough, Clipped])
def test_anything_else_is_not(cls: type[Function]) -> None:
    assert not is_derivative(cls, (torch.ones(2, 5),), Function.apply.__func__)  # type: ignore[attr-defined]
