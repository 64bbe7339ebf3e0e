"""A call of an opaque module as data: what it is called with, and what it returns, in sizes of the model's inputs.

    mixer(h, 0.5)   with h [2, s, 64]    arguments  TensorSpec([2, s, 64]), 0.5      results  TensorSpec([2, s, 64])

Arguments are a key: what a module returns is learnt once for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.errors import CaptureError
from surgery.shapes import Shape, name_length, shape_of, to_expr

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass
class InputSizes:
    """The traced sizes of a model's inputs.

    Two inputs may begin with symbols of their own for one size: `names` has for each symbol the one that is used here.
    """

    sizes: dict[sympy.Expr, torch.SymInt] = field(default_factory=dict)
    names: dict[sympy.Expr, sympy.Expr] = field(default_factory=dict)

    def read(self, tensors: Iterable[tuple[Tensor, tuple[str | int, ...]]]) -> None:
        """Take the sizes of each tensor, whose dimensions have letters or numbers."""
        self.sizes.clear()
        first: dict[str | int, sympy.Expr] = {}
        for tensor, letters in tensors:
            for size, letter in zip(tensor.shape, letters, strict=True):
                if isinstance(size, torch.SymInt):
                    name_length(size)
                    self.sizes[to_expr(size)] = size
                    self.names[to_expr(size)] = first.setdefault(letter, to_expr(size))

    @property
    def example(self) -> dict[sympy.Expr, int]:
        """What the inputs' sizes are in the example that is traced."""
        return {expr: size.node.hint for expr, size in self.sizes.items()}

    def rename(self, shape: Iterable[sympy.Expr]) -> Shape:
        return tuple(expr.subs(self.names) for expr in shape)

    def size(self, expr: sympy.Expr) -> Any:
        """The traced size that `expr`, a product, stands for."""
        size: Any = 1
        for factor in sympy.Mul.make_args(expr):
            size = size * (int(factor) if factor.is_Integer else self.sizes[factor])
        return size


class TensorSpec(NamedTuple):
    """A tensor among the arguments or the results of a call."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device


class Number(NamedTuple):
    """A size among the arguments of a call."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Arguments:
    """What a module is called with: `TensorSpec`s, `Number`s and constants, flattened."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        exprs = [e for leaf in self.leaves for e in _expressions(leaf)]
        return tuple(sorted({s for e in exprs for s in e.free_symbols}, key=str))

    def arrange(self, operands: Sequence[Any], numbers: Sequence[Any]) -> Iterator[Any]:
        """Operands and numbers in the order in which the module takes them."""
        tensors, sizes = iter(operands), iter(numbers)
        for leaf in self.leaves:
            if isinstance(leaf, (TensorSpec, Number)):
                yield next(tensors) if isinstance(leaf, TensorSpec) else next(sizes)


@dataclass(frozen=True)
class Results:
    """What a module returns: `TensorSpec`s and constants, flattened; and whether it draws random numbers on the way."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    is_random: bool

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorSpec))


@dataclass(frozen=True)
class OpaqueCall:
    """One call of one module in a captured graph."""

    path: str
    module_class: str
    reason: str
    arguments: Arguments
    results: Results

    @property
    def why(self) -> str:
        return f"{self.module_class} is called whole on every rank, as it could not be traced: {self.reason}"


def _expressions(leaf: Any) -> tuple[sympy.Expr, ...]:
    if isinstance(leaf, TensorSpec):
        return leaf.shape
    return (leaf.expr,) if isinstance(leaf, Number) else ()


def describe(value: Any, path: str, sizes: InputSizes) -> Any:
    """A value that the module at `path` is called with, as `Arguments` hold it."""
    if isinstance(value, Tensor):
        return TensorSpec(sizes.rename(shape_of(value)), value.dtype, value.device)
    if isinstance(value, torch.SymInt):
        return Number(sizes.rename((to_expr(value),))[0])
    if isinstance(value, CONSTANTS):
        return value
    raise CaptureError(
        f"{path} is called with a {type(value).__name__}. Expected tensors, numbers and words: what else it holds "
        "could not be passed on."
    )
