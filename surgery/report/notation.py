"""How sizes, shapes and arguments are written for people: in letters, as a rank holds them.

    (s72, s38, 4096)       sharded(1)     [B, S/P, 4096]
    (s38*s72, 128256)      sharded(0)     [B*S/P, 128256]
    (s72, 32, s38, 128)    heads(1)       [B, 32/P, S, 128]
    (s72, 2, s38, 128)     rows(2)        [B, 1, rows, 128]
    FloorDiv(s38, 8)                      S/P

Letters: B batch, S sequence, T a decoder's sequence, P sequence-parallel ranks; heads and features are numbers.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from types import FunctionType
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv

from surgery.metadata import Context, facts_of
from surgery.placement import HeadSharded, Placement, RowSharded, Sharded
from surgery.shapes import Lengths, shape_of, to_expr

BATCH, LENGTH, DECODER_LENGTH, RANKS = sympy.symbols("B S T P", positive=True, integer=True)
LENGTHS = (LENGTH, DECODER_LENGTH)
HIDDEN = frozenset({"axis", "device", "layout", "length", "num_heads", "pin_memory", "stream"})
DEFAULTS = {"dropout": 0.0, "inner": 1, "outer": 1}
LAST_INDEX = torch.iinfo(torch.int64).max
DTYPES = {
    torch.bfloat16: "bf16",
    torch.bool: "bool",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Notation:
    """The letters of one graph, whose symbols are named by the capture."""

    batch: sympy.Symbol | None
    lengths: Lengths
    sp_size: int

    def letters(self, expr: sympy.Expr) -> sympy.Expr:
        """`expr` with the graph's symbols replaced by B, S and T, and whole divisions by P written as such."""
        names = dict(zip(self.lengths, LENGTHS, strict=False))
        renamed = expr.xreplace({**names, self.batch: BATCH} if self.batch is not None else names)
        return renamed.replace(FloorDiv, self._division)

    def _division(self, numerator: sympy.Expr, denominator: sympy.Expr) -> sympy.Expr:
        return numerator / (RANKS if denominator == self.sp_size else denominator)

    def size(self, size: int | torch.SymInt) -> str:
        return spell(self.letters(to_expr(size)))

    def shape(self, value: Tensor, placement: Placement) -> tuple[str, ...]:
        """The shape of what one rank holds of `value`."""
        sizes = [spell(self.letters(size)) for size in shape_of(value)]
        if isinstance(placement, Sharded):
            sizes[placement.dim] += "/P"
        elif isinstance(placement, HeadSharded):
            num_heads = int(value.shape[placement.dim])
            sizes[placement.dim] = f"{num_heads}/P" if num_heads >= self.sp_size else "1"
        elif isinstance(placement, RowSharded):
            sizes[placement.head_dim], sizes[placement.dim] = "1", "rows"
        return tuple(sizes)

    def argument(self, value: Any, name_of: Callable[[fx.Node], str]) -> str:
        """One argument of a call; sizes appear as what they are instead of as the node that computes them."""
        if isinstance(value, fx.Node):
            known = value.meta.get("val")
            is_local = isinstance(facts_of(value).placement, Sharded)
            return self.size(known) + "/P" * is_local if isinstance(known, torch.SymInt) else name_of(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.argument(entry, name_of) for entry in value)}]"
        if isinstance(value, float):
            return f"{value:.4g}"
        return "end" if value == LAST_INDEX else str(value).removeprefix("torch.")

    def call(self, node: fx.Node, name_of: Callable[[fx.Node], str]) -> str:
        """`linear(mul_4, q_proj.weight)`: what says nothing is left out."""
        if node.target is operator.getitem:
            return f"{name_of(node.args[0])}[{node.args[1]}]"  # type: ignore[arg-type]
        positional, named = _arguments(node)
        given = [self.argument(value, name_of) for value in positional]
        given += [f"{name}={self.argument(value, name_of)}" for name, value in named if _says_something(name, value)]
        return f"{short_target(node)}({', '.join(given)})"


def _arguments(node: fx.Node) -> tuple[list[Any], list[tuple[str, Any]]]:
    """The arguments to show by position and by name: of our own functions, only the leading tensors by position."""
    if not isinstance(node.target, FunctionType):
        return list(node.args), list(node.kwargs.items())
    signature, bound = inspect.signature(node.target), []
    for name, value in signature.bind(*node.args, **node.kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            bound += [(name, part) for part in value]
        else:
            bound += value.items() if kind is inspect.Parameter.VAR_KEYWORD else [(name, value)]
    positional = list(takewhile(lambda given: isinstance(given[1], fx.Node) and given[0] not in HIDDEN, bound))
    return [value for _, value in positional], bound[len(positional) :]


def _says_something(name: str, value: Any) -> bool:
    return value is not None and name not in HIDDEN and (name not in DEFAULTS or value != DEFAULTS[name])


def notation_of(context: Context) -> Notation:
    return Notation(context.batch, context.lengths, context.axis.size)


def spell(expr: sympy.Expr) -> str:
    """An expression without spaces, batch before sequence: `B*S`, `S+1`."""
    return str(expr).replace(" ", "")


def short_target(node: fx.Node) -> str:
    """`linear` for `torch.ops.aten.linear.default`, the name of a function for anything else."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))


def short_dtype(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))
