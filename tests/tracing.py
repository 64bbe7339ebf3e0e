"""Small functions as ATen graphs, for tests of passes and rules: no model, no process group.

trace(lambda x: x.cumsum(1), "b s 6")    ->   the graph of a function whose batch and sequence may have any size
show(graph)                              ->   one short line a node, for golden printouts
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from surgery.axis import Axis
from surgery.metadata import Context, facts_of
from surgery.pipeline import Pass, PassResult
from surgery.placement import Replicated
from surgery.private import GroupName
from surgery.shapes import to_expr

EXAMPLE = {"b": 2, "s": 16}
ASSERT = torch.ops.aten._assert_scalar.default
DIMS = {"b": Dim("batch"), "s": Dim("sequence", min=8)}


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.function(*inputs)


def parse_shape(text: str, sizes: dict[str, int]) -> list[int]:
    """`"b s 6"` with b = 2, s = 16 is [2, 16, 6]."""
    return [sizes[word] if word in sizes else int(word) for word in text.split()]


def trace(function: Callable[..., Any], *shapes: str, dtypes: tuple[torch.dtype, ...] | None = None) -> fx.GraphModule:
    """The graph of `function` over inputs shaped like `"b s 6"`, in float64 if `dtypes` says nothing else."""
    types = dtypes or (torch.float64,) * len(shapes)
    examples = tuple(torch.ones(parse_shape(text, EXAMPLE), dtype=t) for text, t in zip(shapes, types, strict=True))
    dynamic = tuple({dim: DIMS[word] for dim, word in enumerate(text.split()) if word in DIMS} for text in shapes)
    with torch.backends.opt_einsum.flags(enabled=False):
        program = torch.export.export(
            _Function(function),
            (examples,),
            dynamic_shapes=(dynamic,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    module = program.graph_module
    assert isinstance(module, fx.GraphModule)
    for index, (node, text) in enumerate(zip(module.graph.find_nodes(op="placeholder"), shapes, strict=True)):
        node._rename("xyzuvw"[index])
        node.meta["dims"] = text.split()
    return module


def copy_graph(module: fx.GraphModule) -> fx.Graph:
    """A graph of one's own to rewrite."""
    graph = fx.Graph(owning_module=module)
    graph.output(graph.graph_copy(module.graph, {}))
    return graph


def make_context(graph: fx.Graph, size: int, rank: int = 0, **options: Any) -> Context:
    """The context for passes over a traced graph, on rank `rank` of `size`."""
    symbols = {
        word: to_expr(extent)
        for node in graph.find_nodes(op="placeholder")
        for word, extent in zip(node.meta["dims"], node.meta["val"].shape, strict=True)
    }
    return Context(Axis(size, rank, GroupName("sp")), (symbols["s"],), symbols.get("b"), {}, **options)


@dataclass(frozen=True)
class Operation:
    """What one pass did to one graph."""

    before: str
    after: str
    result: PassResult
    context: Context
    graph: fx.Graph

    def __str__(self) -> str:
        return f"before\n{indent(self.before, '    ')}\n\nafter\n{indent(self.after, '    ')}"


def operate(
    step: Pass,
    module: fx.GraphModule,
    *,
    prepared_by: Iterable[Pass] = (),
    size: int = 4,
    rank: int = 3,
    **options: Any,
) -> Operation:
    """Run `step` over a copy of a traced graph that the passes of `prepared_by` have been over."""
    graph = copy_graph(module)
    context = make_context(graph, size, rank, **options)
    for earlier in prepared_by:
        earlier.run(graph, context)
    before = show(graph)
    result = step.run(graph, context)
    graph.lint()
    return Operation(before, show(graph), result, context, graph)


def show(graph: fx.Graph) -> str:
    """A graph as short lines: `view = aten.view(x, [batch_size, sequence_length, 6])`; behind it, what is not whole."""
    return "\n".join(_line(node) + _placement(node) for node in graph.nodes)


def _placement(node: fx.Node) -> str:
    placements = [str(p) for p in facts_of(node).placements if not isinstance(p, Replicated)]
    return f"    # {', '.join(dict.fromkeys(placements))}" if placements else ""


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_spell(node.args[0])}"
    if node.op == "placeholder":
        return f"{node.name} = input {' '.join(node.meta.get('dims', ()))}".rstrip()
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    shown = node.args[:1] if node.target is ASSERT else node.args  # its message names symbols, which torch may rename
    arguments = [_spell(argument) for argument in shown]
    arguments += [f"{name}={_spell(value)}" for name, value in node.kwargs.items() if name != "axis"]
    return f"{node.name} = {_target(node)}({', '.join(arguments)})"


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).rsplit(".", 1)[0]
    return str(getattr(node.target, "__name__", node.target))


def _spell(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_spell(entry) for entry in argument)}]"
    return "end" if argument == torch.iinfo(torch.int64).max else str(argument)
