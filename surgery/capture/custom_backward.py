"""Backwards of a model's own: a trace keeps the forward of a `torch.autograd.Function` and loses its backward.

    backward is the derivative of forward     GeLUFunction of bloom       traced: autograd gives the same gradient
    backward is something else                a straight-through round    refused: the gradient would change
    x.register_hook(lambda g: g / 2)          a hook on a tensor          refused: the trace's tensor is not a run's
    a custom op with register_autograd        linear in the cotangent     traced: ranks' gradients add up
    one that normalizes or clips the gradient                             refused: they would not

What a backward is cannot be read off a class or an operator, so it is tried on random inputs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from surgery.capture.linearity import is_backward_linear
from surgery.errors import CaptureError, UnsupportedOperationError
from surgery.metadata import where
from surgery.threads import in_own_thread

TOLERANCE = 1e-6  # bloom writes its constants with 8 digits
KNOWN_NAMESPACES = frozenset({"aten", "prims", "surgery", "transformers"})
SCALES = (1.0, 30.0)  # of inputs and cotangents: a backward that clips shows at one of them

ENGINES = "torch.distributed."  # FSDP's hooks are about its shards, which a trace does without


@contextmanager
def refuse_custom_backward() -> Iterator[None]:
    """While a model is traced, refuse functions whose backward is not the derivative of their forward, and hooks.

    What a model checkpoints itself, reentrantly, is traced as if it did not: the rest of the graph would be without
    gradients. So is the checkpoint, where none of its inputs has one.
    """
    original, register_hook = inspect.getattr_static(Function, "apply"), Tensor.register_hook

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        call = original.__get__(None, cls)
        if cls is CheckpointFunction:
            function, _, *inputs = args
            is_learning = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
            with nullcontext() if is_learning else torch.no_grad():
                return function(*inputs)
        if not cls.__module__.startswith("torch.") and not is_derivative(cls, args, call):
            raise CaptureError(
                f"{cls.__module__}.{cls.__qualname__} is a torch.autograd.Function whose backward is not the "
                "derivative of its forward, and a captured graph would lose it. Expected operations that torch "
                "differentiates. Write it as a custom op, if its backward is linear in the gradient."
            )
        return call(*args, **kwargs)

    def refuse_hook(tensor: Tensor, hook: Callable[..., Any]) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith(ENGINES):
            return register_hook(tensor, hook)  # type: ignore[no-untyped-call]
        raise CaptureError(
            "the forward puts a hook on a tensor's gradient, and a captured graph would lose it. Expected operations "
            "that torch differentiates. Scale or clip the gradients of the parameters instead, after the backward."
        )

    with (
        mock.patch.object(Function, "apply", classmethod(apply)),
        mock.patch.object(Tensor, "register_hook", refuse_hook),
    ):
        yield


def refuse_nonlinear_operators(graph: fx.Graph) -> None:
    """Refuse operators from outside of torch whose gradients for addends of a cotangent do not add up."""
    for node in graph.nodes:
        is_operator = isinstance(node.target, torch._ops.OpOverload)
        if is_operator and node.target.namespace not in KNOWN_NAMESPACES and not _is_linear(node.target, node):
            raise UnsupportedOperationError(
                f"{where(node)} has a backward that is not linear in the gradient, or could not be tried: every rank "
                "computes an addend of it, and these are to add up. Expected one that is. Scale or clip the gradients "
                "of the parameters instead, after the backward."
            )


def _is_linear(operator: Callable[..., Any], node: fx.Node) -> bool:
    def example(source: fx.Node) -> Any:
        value = source.meta["val"]
        made = _example(value, 1.0)
        return made.to(value.dtype).to(value.device).requires_grad_() if _is_floating(made) else made

    try:
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)  # the ranks must come to one answer
            args, kwargs = fx.map_arg((node.args, node.kwargs), example)
            sources = [x for x in pytree.tree_leaves((args, kwargs)) if _is_floating(x)]
            outputs = [x for x in pytree.tree_leaves(operator(*args, **kwargs)) if _is_floating(x)]
            return is_backward_linear([x for x in outputs if x.requires_grad], sources)
    except Exception:
        return False


def is_derivative(cls: type[Function], args: tuple[Any, ...], call: Callable[..., Any]) -> bool:
    """Whether `cls.backward` gives what autograd makes of `cls.forward`, for arguments like `args`.

    Tried in a thread of its own, which the modes of the trace do not reach. What cannot be tried is not a derivative.
    """
    return in_own_thread(_try, cls, args, call)


def _try(cls: type[Function], args: tuple[Any, ...], call: Callable[..., Any]) -> bool:
    try:
        return all(_agrees(cls, [_example(arg, scale) for arg in args], call, scale) for scale in SCALES)
    except Exception:
        return False


def _agrees(cls: type[Function], args: list[Any], call: Callable[..., Any], scale: float) -> bool:
    has_context = cls.setup_context is Function.setup_context
    context = (FunctionCtx(),) if has_context else ()
    own = _gradients(call, args, scale)
    plain = _gradients(lambda *a: cls.forward(*context, *a), args, scale)
    return all(
        torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE) for one, other in zip(own, plain, strict=True)
    )


def _gradients(function: Callable[..., Any], args: list[Any], scale: float) -> list[Tensor]:
    """The outputs of `function`, and the gradients of a weighted sum of them."""
    inputs = [arg.clone().requires_grad_() if _is_floating(arg) else arg for arg in args]
    result = function(*(x.clone() if _is_floating(x) else x for x in inputs))
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if _is_floating(x)]
    total = sum((x * torch.linspace(scale, 2 * scale, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)
    assert isinstance(total, Tensor)
    sources = [x for x in inputs if _is_floating(x)]
    gradients = torch.autograd.grad(total, sources, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(sources, gradients, strict=True))]


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _example(arg: Any, scale: float) -> Any:
    """A real argument like a traced one: tensors of the traced sizes, random where floating, zero where not."""
    if isinstance(arg, torch.SymInt):
        return arg.node.hint
    if not isinstance(arg, Tensor):
        return arg
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in arg.shape]
    if not arg.is_floating_point():
        return torch.zeros(sizes, dtype=arg.dtype)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sizes, dtype=torch.float64, generator=generator) * scale
