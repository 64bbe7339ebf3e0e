"""Make the placements true: convert operands where they differ from what a step needs, and allocate local sizes.

    replicated -> sharded     shard(x, dim)          a slice; backward: zeros around it
    sharded -> replicated     gather(x, dim)         an all-gather; backward: a reduce-scatter
    partial -> anything       all_reduce(x)          backward: an all-reduce
    view(x, [B, S, -1, H])    view(x, [B, local_length(S), N, H])

Each value is converted once per placement, right where it is made. A size of -1 beside a local one is written out: a
rank may hold no tokens, and then it could be anything. Code that is not torch's own, custom operators and opaque
modules, may read memory as it lies: what is contiguous in the whole model is made so for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from surgery import collectives
from surgery.attention.operators import MASK
from surgery.axis import local_length
from surgery.capture.opaque import OPAQUE
from surgery.metadata import KEY, Context, NodeFacts, facts_of
from surgery.pipeline import PassResult
from surgery.placement import REPLICATED, Partial, Placement, Replicated, Sharded
from surgery.rules.call import Step, bind_arguments, set_argument, tensor_nodes
from surgery.rules.table import operation_name
from surgery.rules.views import SIZES
from surgery.shapes import is_contiguous, length_of, quotient, shape_of, to_expr
from surgery.sizes import Size, size_node, times

CONTIGUOUS = torch.ops.aten.contiguous.default


@dataclass(frozen=True)
class InsertConversions:
    name: ClassVar[str] = "insert-conversions"
    requires: ClassVar[frozenset[str]] = frozenset({"placements"})
    provides: ClassVar[frozenset[str]] = frozenset({"converted"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        editor = _Editor(graph, context)
        nodes = [node for node in graph.nodes if facts_of(node).step is not None]
        for node in nodes:
            editor.apply(node)
        editor.finish_outputs()
        return PassResult(len(editor.converted) + editor.num_local_sizes)


@dataclass
class _Editor:
    """The edits of one run, which remembers each conversion by value and placement, each copy, and each local size."""

    graph: fx.Graph
    context: Context
    converted: dict[tuple[fx.Node, Placement], fx.Node] = field(default_factory=dict)
    contiguous: dict[fx.Node, fx.Node] = field(default_factory=dict)
    local_sizes: dict[sympy.Expr, fx.Node] = field(default_factory=dict)
    num_local_sizes: int = 0

    def apply(self, node: fx.Node) -> None:
        step = facts_of(node).step
        assert step is not None
        self._localize_sizes(node, step)
        for source, placement in zip(tensor_nodes(node), step.operands, strict=True):
            operand = self._convert(source, placement)
            # a mask lies as in the whole model: one function makes it, here and there
            if knows_layout(node) and source.target is not MASK and is_contiguous(source.meta["val"]):
                operand = self._laid_out(operand)
            node.replace_input_with(source, operand)
        if step.replacement is not None:
            with self.graph.inserting_before(node):
                self._replace(node, step)

    def finish_outputs(self) -> None:
        """Outputs leave whole, or as shards along one whole dimension."""
        output = next(iter(reversed(self.graph.nodes)))
        for source in output.all_input_nodes:
            placement = facts_of(source).placement
            is_leaving = isinstance(placement, Replicated) or (
                isinstance(placement, Sharded) and placement.is_whole_dim
            )
            if not is_leaving:
                output.replace_input_with(source, self._convert(source, REPLICATED))

    def _convert(self, source: fx.Node, placement: Placement) -> fx.Node:
        if facts_of(source).placement == placement:
            return source
        key = (source, placement)
        if key not in self.converted:
            with self.graph.inserting_before(self._anchor(source).next):
                self.converted[key] = self._conversion(source, placement)
        return self.converted[key]

    def _laid_out(self, operand: fx.Node) -> fx.Node:
        if operand not in self.contiguous:
            with self.graph.inserting_before(operand.next):
                self.contiguous[operand] = self.graph.call_function(CONTIGUOUS, (operand,))
            self.contiguous[operand].meta = dict(operand.meta)
        return self.contiguous[operand]

    def _anchor(self, source: fx.Node) -> fx.Node:
        """The node behind which a conversion of `source` stands: `source`, or the last of the sizes for an input."""
        return max((source, *self.context.sizes.values())) if source.op == "placeholder" else source

    def _conversion(self, source: fx.Node, placement: Placement) -> fx.Node:
        current = facts_of(source).placement
        if isinstance(current, Partial):
            source, current = self._emit(collectives.all_reduce, source, (), REPLICATED), REPLICATED
        elif isinstance(current, Sharded):
            length = size_node(self.graph, length_of(shape_of(source.meta["val"]), current), self.context.sizes)
            source = self._emit(collectives.gather, source, (*self._around(current), length), REPLICATED)
        if isinstance(placement, Sharded):
            source = self._emit(collectives.shard, source, self._around(placement), placement)
        return source

    def _around(self, placement: Sharded) -> tuple[Size, ...]:
        sizes = self.context.sizes
        outer, inner = (size_node(self.graph, expr, sizes) for expr in (placement.outer, placement.inner))
        return placement.dim, outer, inner

    def _emit(self, function: Callable[..., Any], source: fx.Node, args: tuple[Any, ...], to: Placement) -> fx.Node:
        node = self.graph.call_function(function, (source, *args), {"axis": self.context.axis})
        node.meta = {key: source.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in source.meta}
        node.meta[KEY] = NodeFacts((to,), "conversion")
        return node

    def _localize_sizes(self, node: fx.Node, step: Step) -> None:
        sizes = step.sizes
        if facts_of(node).family == "region":
            node.args = fx.map_arg(node.args, self._local)
            sizes = SIZES.get(operation_name(node.target))
        result = step.results[0] if step.results else REPLICATED
        if sizes is None or not isinstance(result, Sharded):
            return
        given = list(bind_arguments(node)[sizes])
        position = result.dim - step.first_size_dim
        if 0 <= position < len(given) and given[position] != -1:
            given[position] = self._local(given[position])
            shape = shape_of(node.meta["val"])[step.first_size_dim :]
            set_argument(node, sizes, [self._written_out(*pair, node) for pair in zip(given, shape, strict=False)])

    def _written_out(self, size: Any, expr: sympy.Expr, node: fx.Node) -> Any:
        """A size of -1, which can only be told from the others while a rank holds tokens, as what it stands for."""
        if size != -1 or not expr.free_symbols <= self.context.sizes.keys():
            return size
        with self.graph.inserting_before(node):
            return size_node(self.graph, expr, self.context.sizes)

    def _local(self, size: Any) -> Any:
        """What this rank holds of a `size` that counts tokens of a whole sequence: of B * S, B * local_length(S)."""
        if not isinstance(size, fx.Node) or not isinstance(size.meta.get("val"), torch.SymInt):
            return size
        expr = to_expr(size.meta["val"])
        length = next((length for length in self.context.lengths if quotient(expr, length) is not None), None)
        if length is None:
            return size
        self.num_local_sizes += 1
        if expr not in self.local_sizes:
            self.local_sizes[expr] = self._local_size(expr, length)
            self.local_sizes[expr].meta = {"val": size.meta["val"], KEY: NodeFacts((Sharded(0),), "size")}
        return self.local_sizes[expr]

    def _local_size(self, expr: sympy.Expr, length: sympy.Symbol) -> fx.Node:
        """The node that computes a local size, behind the sizes that all of the graph reads."""
        whole = self.context.sizes[length]
        if expr == length:
            with self.graph.inserting_after(max(self.context.sizes.values())):
                return self.graph.call_function(local_length, (whole,), {"axis": self.context.axis})
        own = self._local(whole)
        with self.graph.inserting_before(own.next):
            factor = size_node(self.graph, sympy.cancel(expr / length), self.context.sizes)
            return times(self.graph, own, factor)

    def _replace(self, node: fx.Node, step: Step) -> None:
        numbers = {name: size_node(self.graph, expr, self.context.sizes) for name, expr in step.numbers}
        node.kwargs = {**bind_arguments(node), **dict(step.whole), **numbers}
        node.args = ()
        node.target = step.replacement  # type: ignore[assignment]


def knows_layout(node: fx.Node) -> bool:
    """Whether `node` may read its operands by their strides, as code does that is not torch's or ours."""
    target: Any = node.target
    is_operator = isinstance(target, torch._ops.OpOverload)
    return target is OPAQUE or (is_operator and target.namespace not in ("aten", "surgery"))
