"""A length that never varies becomes a number."""

from __future__ import annotations

import pytest
from torch import Tensor, fx

from passes.canonicalize_sizes import CanonicalizeSizes
from passes.insert_conversions import InsertConversions
from passes.propagate_placements import PropagatePlacements
from passes.relax_views import RelaxViews
from passes.specialize_length import SpecializeLength, find_constants
from surgery.pipeline import Pass
from tests.golden import check_golden
from tests.tracing import operate, trace

CONVERTED: tuple[Pass, ...] = (RelaxViews(), CanonicalizeSizes(), PropagatePlacements(), InsertConversions())


def scaled(x: Tensor) -> Tensor:
    return (x * 2).view(x.shape[0], x.shape[1], 2, 3) / (x.shape[1] + 1)


@pytest.fixture(scope="module")
def module() -> fx.GraphModule:
    return trace(scaled, "b s 6")


def test_golden(module: fx.GraphModule) -> None:
    done = operate(SpecializeLength(), module, prepared_by=CONVERTED, fixed_length=64)
    check_golden("specialize_length.txt", str(done))
    assert find_constants(done.graph) == []


def test_leaves_any_length_alone(module: fx.GraphModule) -> None:
    done = operate(SpecializeLength(), module, prepared_by=CONVERTED)
    assert done.result.changed == 0
    assert done.before == done.after
