"""The rule table, row by row: an operation computes on shards what it computes on the whole, forward and backward.

a function, its inputs  ->  a graph  ->  placed and converted by the real passes  ->  run on P simulated ranks
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from passes.canonicalize_sizes import CanonicalizeSizes
from passes.extract_assumptions import ExtractAssumptions
from passes.inline_blocks import InlineBlocks
from passes.insert_conversions import InsertConversions
from passes.locate_attention import LocateAttention
from passes.propagate_placements import PropagatePlacements
from passes.relax_views import RelaxViews
from surgery.metadata import facts_of
from surgery.placement import Placement, Replicated, Sharded
from surgery.rules import RULES
from surgery.rules.table import operation_name
from surgery.verify.simulation import run_ranks
from tests.rule_cases import CASES, Case
from tests.tracing import copy_graph, make_context, parse_shape, trace

BATCH_SIZE = 3
SETTINGS = ((2, 8), (4, 8), (4, 7), (4, 3))
"""Ranks and tokens: a length that they divide, one that they do not, and fewer tokens than ranks."""
TOLERANCE = 1e-12
TESTED_ELSEWHERE = {"surgery::attention"}
PLACE = (
    InlineBlocks(),
    ExtractAssumptions(),
    RelaxViews(),
    CanonicalizeSizes(),
    LocateAttention(),
    PropagatePlacements(),
)


def make_inputs(case: Case, length: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def make(text: str) -> Tensor:
        shape = parse_shape(text.strip("=#"), {"b": BATCH_SIZE, "s": length})
        if text.startswith("#"):
            return torch.randint(6, shape, generator=generator)
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    return tuple(make(text) for text in case.shapes)


def cases() -> Iterator[Any]:
    """Every case in every setting, but for lengths that the operation itself refuses, such as 7 tokens in fours."""
    for case in CASES:
        for size, length in SETTINGS:
            if length == SETTINGS[0][1] or can_run(case, length):
                name = f"{case.operation.removeprefix('aten::')}-{case.expected}-{size}-{length}"
                yield pytest.param(case, size, length, id=name)


def can_run(case: Case, length: int) -> bool:
    try:
        case.function(*make_inputs(case, length))
    except (RuntimeError, IndexError):
        return False
    return True


@pytest.mark.parametrize(("case", "size", "length"), list(cases()))
def test_exact_on_shards(case: Case, size: int, length: int) -> None:
    graph = copy_graph(traced(case))
    context = make_context(graph, size)
    for step in PLACE:
        step.run(graph, context)
    assert outcome(graph, case.operation) == case.expected
    InsertConversions().run(graph, context)
    placements = output_placements(graph)

    inputs = make_inputs(case, length)
    expected = as_tuple(case.function(*inputs))
    by_rank = run_ranks(graph, size, inputs)
    found = tuple(assemble([values[i] for values in by_rank], placements[i]) for i in range(len(expected)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_row_runs_on_shards() -> None:
    tested = {case.operation for case in CASES if case.expected not in ("gathered", "replicated")}
    rows = {name if name in RULES else "pointwise" for name in tested}
    assert rows | TESTED_ELSEWHERE == set(RULES)


def test_every_family_refuses_something() -> None:
    gathered = {case.operation for case in CASES if case.expected == "gathered"}
    families = {RULES[operation].family for operation in gathered & RULES.keys()}
    assert families >= {row.family for row in RULES.values()} - {"attention", "creation", "pointwise", "random"}


@cache
def traced(case: Case) -> fx.GraphModule:
    """The graph of a case. Floating inputs are copied unless they are marked whole: the copy is placed as shards."""

    def function(*inputs: Tensor) -> Any:
        entering = zip(inputs, case.shapes, strict=True)
        return case.function(*(x if text[0] in "=#" else x.clone() for x, text in entering))

    dtypes = tuple(torch.int64 if text.startswith("#") else torch.float64 for text in case.shapes)
    return trace(function, *(text.strip("=#") for text in case.shapes), dtypes=dtypes)


def outcome(graph: fx.Graph, operation: str) -> str:
    """What becomes of the last call of `operation`: its placement, or "gathered"."""
    calls = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    facts = facts_of(next(node for node in reversed(calls) if operation_name(node.target) == operation))
    return "gathered" if facts.family == "gathered" else str(facts.placement)


def output_placements(graph: fx.Graph) -> list[Placement]:
    output = next(iter(reversed(graph.nodes)))
    return [facts_of(source).placement for source in output.args[0]]


def assemble(values: list[Tensor], placement: Placement) -> Tensor:
    """The whole value from what the ranks hold of it; a replicated one as their mean, after comparing them."""
    if isinstance(placement, Sharded):
        assert placement.is_whole_dim
        return torch.cat(values, placement.dim)
    assert isinstance(placement, Replicated)
    assert all(torch.equal(value, values[0]) for value in values)
    return torch.stack(values).mean(0) if values[0].is_floating_point() else values[0]


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of a fixed random weighting of the outputs, zero for inputs that do not matter."""
    generator = torch.Generator().manual_seed(1)
    floating = [output for output in outputs if output.requires_grad]
    if not floating:
        return ()
    weights = [torch.randn(output.shape, dtype=output.dtype, generator=generator) for output in floating]
    leaves = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(floating, leaves, weights, materialize_grads=True)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
