"""What does nothing is dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.remove_no_ops import RemoveNoOps, find_no_ops
from tests.golden import check_golden
from tests.tracing import copy_graph, operate, trace


def idle(x: Tensor) -> Tensor:
    x = F.dropout(x.to(torch.float64), 0.1, training=False)
    return x[:, :].expand(x.shape[0], -1, -1) + 1


def busy(x: Tensor) -> Tensor:
    x = F.dropout(x.to(torch.float32), 0.1)
    x = x.to(torch.float32, copy=True)
    return torch.ops.aten.slice(x, 1, 1).expand(2, -1, -1, -1)


def test_golden() -> None:
    done = operate(RemoveNoOps(), trace(idle, "b s 6"))
    check_golden("remove_no_ops.txt", str(done))
    assert done.result.changed == done.before.count("\n") - done.after.count("\n")


def test_leaves_alone_what_does_something() -> None:
    done = operate(RemoveNoOps(), trace(busy, "b s 6"))
    assert [n.target for n in find_no_ops(copy_graph(trace(busy, "b s 6"))) if "assert" not in n.name] == []
    for kept in ("dropout", "to", "slice", "expand"):
        assert f"aten.{kept}(" in done.after
