"""A rewritten graph, ready to run as a method of the model it came from.

The generated function reads `self.model.layers[0]...weight` when it runs, so parameters may be moved, tied or replaced
after the transform: an optimizer, DDP, ZeRO or PEFT sees and changes the very ones the graph uses.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.axis import Axis
from surgery.capture.branches import Sides
from surgery.capture.capture import Capture
from surgery.inputs.signature import Signature
from surgery.metadata import Context, facts_of
from surgery.placement import Placement, Sharded
from surgery.programs.segments import Cuts, cut_graph
from surgery.sizes import predicate


@dataclass(frozen=True)
class Program:
    """One captured and rewritten call signature.

    `context`: what the passes found. `output_spec`: the model's output class, flattened. `code`, `function`: the graph
    as Python, and compiled. `cuts`: the modules that are called inside it. `sides`: those that it takes of the model's
    branches on data.
    """

    signature: Signature
    graph: fx.Graph
    context: Context
    output_spec: pytree.TreeSpec
    code: str
    function: Callable[..., tuple[Any, ...]]
    cuts: Cuts
    sides: Sides

    @functools.cached_property
    def serves(self) -> Callable[..., bool]:
        """`serves(B, *lengths)`: whether these sizes are on the captured ones' side of the model's branches."""
        batch, lengths = self.context.batch, list(self.context.lengths)
        conditions = list(self.context.assumptions)
        if len(set(lengths)) < len(lengths):  # the graph is for two sequences of one length
            lengths[1] = sympy.Symbol("other", integer=True)
            conditions.append(sympy.Eq(*lengths))
        if batch is None:  # none varies where a graph is for a batch of one
            batch = sympy.Symbol("batch_size", integer=True)
        return predicate([batch, *lengths], conditions)

    def takes(self, sides: Sides | None) -> bool:
        """Whether the graph begins with these sides of the model's branches on data."""
        return sides is None or self.sides[: len(sides)] == sides

    def run(
        self, model: nn.Module, tensors: dict[str, Tensor], deal_out: Callable[[Tensor, int], Tensor] | None = None
    ) -> Any:
        """The model's output for `tensors`; `deal_out(x, dim)` is what becomes of those that leave as shards."""
        outputs = list(self.function(model, *(tensors[tensor.name] for tensor in self.signature.tensors)))
        if deal_out is not None:
            for index, dim in self._sharded_outputs.items():
                outputs[index] = deal_out(outputs[index], dim)
        return pytree.tree_unflatten(outputs, self.output_spec)

    @functools.cached_property
    def _sharded_outputs(self) -> dict[int, int]:
        """The dimension of the sequence in each output that leaves as shards, by its place."""
        nodes: Any = next(iter(reversed(self.graph.nodes))).args[0]
        placements = {i: facts_of(node).placement for i, node in enumerate(nodes) if isinstance(node, fx.Node)}
        return {i: placement.dim for i, placement in placements.items() if isinstance(placement, Sharded)}

    @property
    def outputs(self) -> tuple[tuple[str, fx.Node], ...]:
        """The nodes the graph returns, with their fields in the model's output class: `loss`, `logits`."""
        output = next(iter(reversed(self.graph.nodes)))
        names = [".".join(str(key).strip(".[]'\"") for key in path) for path, _ in self._output_paths()]
        return tuple((n, node) for n, node in zip(names, output.args[0], strict=True) if isinstance(node, fx.Node))

    @property
    def output_placements(self) -> dict[str, Placement]:
        """The placement of each output, by its field in the model's output class."""
        return {name: facts_of(node).placement for name, node in self.outputs}

    def _output_paths(self) -> list[Any]:
        leaves = [object()] * self.output_spec.num_leaves
        return list(pytree.tree_flatten_with_path(pytree.tree_unflatten(leaves, self.output_spec))[0])


def build_program(captured: Capture, signature: Signature, context: Context, cuts: Cuts) -> Program:
    """Compile the graph of `captured` into a function of the model and the signature's tensors."""
    code, function = _link(captured.graph, context, cuts)
    return Program(signature, captured.graph, context, captured.output_spec, code, function, cuts, captured.sides)


def relink(program: Program, cuts: Cuts) -> Program:
    """The same graph, with the calls of other modules in it: after an engine has put its hooks on the model."""
    if program.cuts == cuts:
        return program
    code, function = _link(program.graph, program.context, cuts)
    return replace(program, code=code, function=function, cuts=cuts)


def move_to_rank(program: Program, axis: Axis) -> Program:
    """The program with its graph changed to that of another rank: nodes are called with another `axis`.

    Nothing else tells one rank's graph from another's, where the length is variable.
    """
    for node in program.graph.nodes:
        if isinstance(node.kwargs.get("axis"), Axis):
            node.kwargs = {**node.kwargs, "axis": axis}
    context = replace(program.context, axis=axis)
    code, function = _link(program.graph, context, program.cuts)
    return replace(program, context=context, code=code, function=function)


def _link(graph: fx.Graph, context: Context, cuts: Cuts) -> tuple[str, Callable[..., tuple[Any, ...]]]:
    cuts = cuts.without({call.path for call in context.opaque_calls})
    name = f"<surgery {id(graph)}>"
    if cuts.paths:
        graph = cut_graph(graph, cuts, lambda body, segment: _compile(body, f"{name} {segment}")[1])
    return _compile(graph, name)


def _compile(graph: fx.Graph, name: str) -> tuple[str, Callable[..., tuple[Any, ...]]]:
    source = graph.python_code("self")
    linecache.cache[name] = (len(source.src), None, source.src.splitlines(keepends=True), name)
    namespace: dict[str, Any] = dict(source.globals)
    exec(compile(source.src, name, "exec"), namespace)
    return source.src, namespace["forward"]
