"""Wrapped blocks become part of one flat graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.inline_blocks import InlineBlocks, find_blocks
from surgery.errors import CaptureError
from tests.golden import check_golden
from tests.tracing import copy_graph, operate, trace


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        doubled = x * 2
        order = doubled.argsort(-1)
    return x.gather(-1, order) + doubled


def without_autocast(x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        scale = x.exp()
    return x * scale


def with_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.transpose(1, 2)


def test_golden() -> None:
    done = operate(InlineBlocks(), trace(without_gradient, "b s 6"))
    check_golden("inline_blocks.txt", str(done))
    assert done.result.changed == 1
    assert done.graph.owning_module is None


def test_nested_regions() -> None:
    done = operate(InlineBlocks(), trace(without_autocast, "b s 6"))
    assert done.result.changed == 2
    assert find_blocks(done.graph) == []
    assert "= aten.exp(x)" in done.after


def test_leaves_a_flat_graph_alone() -> None:
    done = operate(InlineBlocks(), trace(lambda x: x * 2, "b s 6"))
    assert done.result.changed == 0
    assert done.before == done.after


def test_refuses_autocast_that_is_switched_on() -> None:
    module = trace(with_autocast, "b s 6")
    assert find_blocks(copy_graph(module))
    with pytest.raises(CaptureError, match=r"switches autocast on inside its forward.*Cast the model instead"):
        operate(InlineBlocks(), module)


def test_what_comes_out_as_it_went_in_keeps_its_gradient() -> None:
    def cast(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.to(x.dtype).contiguous()  # x itself
            z = torch.view_as_complex(x)
        return y + z.abs().unsqueeze(-1)

    done = operate(InlineBlocks(), trace(cast, "b s 2"))
    assert done.after.count("aten.detach(") == 1, "of the complex numbers alone"
