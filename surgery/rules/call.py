"""What a rule sees (`Call`) and what it answers (`Step`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from surgery.placement import REPLICATED, Placement, Sharded
from surgery.shapes import Lengths, Shape, shape_of


@dataclass(frozen=True)
class Operand:
    """A tensor argument of an operation: the node it comes from, its whole (global) shape, and its placement."""

    node: fx.Node
    shape: Shape
    placement: Placement

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.placement, Sharded)


@dataclass(frozen=True)
class Call:
    """One operation of the graph, its tensor operands in the order of its arguments, its results' whole shapes.

    `lengths` are those of the model's sequences: one, or the encoder's and the decoder's.
    """

    node: fx.Node
    arguments: dict[str, Any]
    operands: tuple[Operand, ...]
    results: tuple[Shape, ...]
    lengths: Lengths

    @property
    def shape(self) -> Shape:
        """The shape of the (first) result."""
        return self.results[0]

    @property
    def sharded(self) -> tuple[Operand, ...]:
        return tuple(operand for operand in self.operands if operand.is_sharded)

    @property
    def source(self) -> Sharded | None:
        """How the first operand is sharded; None where it is whole."""
        placement = self.operands[0].placement
        return placement if isinstance(placement, Sharded) else None

    @property
    def lead(self) -> tuple[Operand, Sharded]:
        """The first operand that is sharded, and how."""
        operand = self.sharded[0]
        assert isinstance(operand.placement, Sharded)
        return operand, operand.placement

    def operand(self, name: str) -> Operand | None:
        """The operand bound to the argument called `name`, if a tensor was passed there."""
        node = self.arguments.get(name)
        return next((operand for operand in self.operands if operand.node is node), None)

    def dim(self, name: str = "dim", *, ndim: int | None = None) -> int:
        """The argument called `name` as a non-negative dimension of the first operand."""
        ndim = len(self.operands[0].shape) if ndim is None else ndim
        return int(self.arguments[name]) % max(ndim, 1)

    def step(self, required: Mapping[fx.Node, Placement], *results: Placement) -> Step:
        """The step whose operands must be as `required` of their nodes."""
        return Step(tuple(required[operand.node] for operand in self.operands), results)

    def with_placements(self, placements: tuple[Placement, ...]) -> Call:
        operands = tuple(replace(o, placement=p) for o, p in zip(self.operands, placements, strict=True))
        return replace(self, operands=operands)


@dataclass(frozen=True)
class Step:
    """How an operation runs on shards.

    `operands` are the placements its operands must have (a conversion is inserted where one differs), `results` those
    its results then have. `sizes` names the argument that lists output sizes, beginning at output dimension
    `first_size_dim`: the sharded one is made local. `replacement` is called in the operation's stead, with the
    operation's arguments by name, the nodes of `whole`, which are passed as they are, before any conversion,
    and the sizes of `numbers`, which are those of the whole.
    """

    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    sizes: str | None = None
    first_size_dim: int = 0
    replacement: Callable[..., Any] | None = None
    whole: tuple[tuple[str, fx.Node], ...] = ()
    numbers: tuple[tuple[str, sympy.Expr], ...] = ()

    @property
    def is_sharded(self) -> bool:
        return any(isinstance(result, Sharded) for result in self.results)


Rule = Callable[[Call], Step | None]


def replicated(call: Call) -> Step:
    """The step in which every rank computes the whole value."""
    return Step((REPLICATED,) * len(call.operands), (REPLICATED,) * len(call.results))


def uniform(call: Call, placement: Placement) -> Step:
    """All operands as `placement`, and so the results."""
    return Step((placement,) * len(call.operands), (placement,) * len(call.results))


def bind_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults filled in."""
    return bind_schema(node.target, node.args, node.kwargs)


def bind_schema(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same for an operator and what it is called with."""
    schema = operator._schema
    names = [argument.name for argument in schema.arguments]
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(zip(names, args, strict=False))
    bound.update(kwargs)
    return bound


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give an operator another argument, by position or by name as it has it."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def tensor_nodes(node: fx.Node, *, with_tuples: bool = False) -> tuple[fx.Node, ...]:
    """The distinct tensor-valued inputs of `node`, in the order of its arguments; on request also tuples of tensors."""
    kinds = (torch.Tensor, tuple, list) if with_tuples else torch.Tensor
    return tuple(source for source in node.all_input_nodes if isinstance(source.meta.get("val"), kinds))


def make_call(node: fx.Node, placements: dict[fx.Node, Placement], lengths: Lengths) -> Call:
    """Describe `node` for the rules; `placements` holds those of its operands."""
    operands = tuple(Operand(n, shape_of(n.meta["val"]), placements[n]) for n in tensor_nodes(node))
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    results = tuple(shape_of(v) if isinstance(v, torch.Tensor) else () for v in values)
    return Call(node, bind_arguments(node), operands, results, lengths)
