"""What the capture assumed of its sizes leaves the graph and is known to the program."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from passes.extract_assumptions import ASSERT, ExtractAssumptions, find_assumptions
from tests.golden import check_golden
from tests.tracing import copy_graph, make_context, operate, trace


def branching(x: Tensor) -> Tensor:
    return x if x.shape[1] == 20 else x * 2


def checked_by_data(x: Tensor) -> Tensor:
    count = (x > 0).sum().item()
    torch._check(count >= 0)
    return x * count


def test_golden() -> None:
    done = operate(ExtractAssumptions(), trace(branching, "b s 6"))
    check_golden("extract_assumptions.txt", str(done))
    (assumption,) = done.context.assumptions
    assert assumption.subs({done.context.length: 20}) == sympy.false
    assert assumption.subs({done.context.length: 24}) == sympy.true


def test_find_changes_nothing() -> None:
    graph = copy_graph(trace(branching, "b s 6"))
    context = make_context(graph, 4)
    found = find_assumptions(graph, context)
    assert found and set(found) == set(graph.find_nodes(op="call_function", target=ASSERT))
    assert context.assumptions == []


def test_leaves_alone_what_is_asserted_of_data() -> None:
    done = operate(ExtractAssumptions(), trace(checked_by_data, "b s 6"))
    assert done.context.assumptions == []
    assert done.graph.find_nodes(op="call_function", target=ASSERT)
