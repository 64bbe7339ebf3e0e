"""Views by shape instead of by memory layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.relax_views import RelaxViews, find_views
from surgery.errors import UnsupportedOperationError
from tests.golden import check_golden
from tests.tracing import operate, trace


def viewed(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.view(-1, 6), torch.ops.aten._reshape_alias(x, [x.shape[0], x.shape[1] * 6], [x.shape[1] * 6, 1])


def test_golden() -> None:
    done = operate(RelaxViews(), trace(viewed, "b s 6"))
    check_golden("relax_views.txt", str(done))
    assert done.result.changed == 2
    assert find_views(done.graph) == []


def test_leaves_reshapes_alone() -> None:
    done = operate(RelaxViews(), trace(lambda x: x.reshape(-1, 6).unsqueeze(0), "b s 6"))
    assert done.result.changed == 0
    assert done.before == done.after


def test_refuses_strides() -> None:
    module = trace(lambda x: x.as_strided((2, 6), (6, 1)), "b s 6")
    with pytest.raises(UnsupportedOperationError, match=r"as_strided.* reads memory by strides.*Use view"):
        operate(RelaxViews(), module)
