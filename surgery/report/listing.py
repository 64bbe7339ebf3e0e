"""One value of a rewritten graph as a line for people.

    linear    linear(mul_4, q_proj.weight)   f32 [B, S/P, 4096]   sharded(1)

Parameters and sizes have no lines of their own: they appear where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from surgery import collectives
from surgery.metadata import facts_of, module_class, module_path, source_line
from surgery.report.costs import KINDS
from surgery.report.layers import split_path
from surgery.report.notation import Notation, short_dtype

WORDS = {"all-to-all": "exchange", "all-gather": "gather", "all-reduce": "all-reduce"}
MARKS: dict[Any, str] = {function: WORDS[kind.forward] for function, kind in KINDS.items()}
MARKS[collectives.shard] = "shard"


@dataclass(frozen=True)
class Line:
    """One value: `part` is the module inside the layer; `mark` names an exchange or a conversion, or is empty."""

    name: str
    call: str
    part: str
    dtype: str
    shape: tuple[str, ...] | None
    placement: str
    family: str
    mark: str
    source_line: str

    @property
    def type(self) -> str:
        """`f32 [B, S/P, 4096]`, or "tuple"."""
        return f"{self.dtype} [{', '.join(self.shape)}]" if self.shape is not None else "tuple"


def is_shown(node: fx.Node) -> bool:
    """Whether a node has a line: inputs, and operations that make tensors."""
    value = node.meta.get("val")
    is_value = isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and node.op == "call_function")
    return is_value and node.op in ("placeholder", "call_function")


def make_line(node: fx.Node, notation: Notation, value_name: Callable[[fx.Node], str]) -> Line:
    """The line of one value, with the names that `value_name` gives to values."""
    value, facts = node.meta["val"], facts_of(node)
    part = part_of(node)

    def name_of(source: fx.Node) -> str:
        return _parameter_name(source, node, part) if source.op == "get_attr" else value_name(source)

    is_tensor, is_input = isinstance(value, Tensor), node.op == "placeholder"
    return Line(
        name=value_name(node),
        call="" if is_input else notation.call(node, name_of),
        part=part,
        dtype=short_dtype(value.dtype) if is_tensor else "",
        shape=notation.shape(value, facts.placement) if is_tensor else None,
        placement=str(facts.placement),
        family="input" if is_input else facts.family,
        mark=MARKS.get(node.target, ""),
        source_line=source_line(node),
    )


def part_of(node: fx.Node) -> str:
    """The heading of a line: `self_attn` inside a layer, the module outside the layers, a class for either itself."""
    layer, rest = split_path(module_path(node))
    part = rest.split(".")[0] if layer is not None else rest
    return part or module_class(node)


def _parameter_name(source: fx.Node, user: fx.Node, part: str) -> str:
    """A parameter's path from where it is used: `q_proj.weight` in `model.layers.0.self_attn`."""
    layer, _ = split_path(module_path(user))
    name = str(source.target)
    for prefix in (layer.path if layer is not None else "", part):
        name = name.removeprefix(f"{prefix}.") if prefix else name
    return name
