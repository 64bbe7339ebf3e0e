"""Attention calls become calls of sdpa on this rank's heads; masks are built once."""

from __future__ import annotations

import pytest
from torch import Tensor

from passes.insert_all_to_all import InsertAllToAll
from passes.lower_attention import LowerAttention
from surgery.attention.implementations import sdpa
from surgery.errors import UnsupportedOperationError
from tests.golden import check_golden
from tests.passes.attending import CONVERTED, KEYS, attend, causal, describe
from tests.tracing import operate, trace

EXCHANGED = (*CONVERTED, InsertAllToAll())


def test_golden() -> None:
    done = operate(LowerAttention(), causal(), prepared_by=EXCHANGED)
    check_golden("lower_attention.txt", str(done))
    assert done.result.changed == 1


def test_calls_share_a_mask() -> None:
    def twice(q: Tensor, k: Tensor) -> Tensor:
        mask = describe(q, window=3)
        return attend(attend(q * 2, k * 2, mask), k * 2, mask)

    done = operate(LowerAttention(), trace(twice, KEYS, KEYS), prepared_by=EXCHANGED)
    (mask,) = (node for node in done.graph.nodes if getattr(node.target, "__name__", "") == "make_mask")
    assert mask.kwargs["window"] == 3
    assert all(call.args[3] is mask for call in done.graph.find_nodes(op="call_function", target=sdpa))


def test_leaves_alone_a_graph_without_attention() -> None:
    done = operate(LowerAttention(), trace(lambda x: x * 2, "b s 6"), prepared_by=EXCHANGED)
    assert done.result.changed == 0
    assert done.before == done.after


def test_refuses_masks_for_some_of_the_heads() -> None:
    module = trace(lambda q, k: attend(q * 2, k * 2, (q @ k.transpose(2, 3))[:, :2] > 0), KEYS, KEYS)
    with pytest.raises(UnsupportedOperationError, match=r"lower-attention: a mask .* at .*Expected .*\[B, 1, S, S\]"):
        operate(LowerAttention(), module, prepared_by=EXCHANGED)
