"""An exchange around every attention call whose tokens are sharded."""

from __future__ import annotations

from torch import fx

from passes.insert_all_to_all import InsertAllToAll
from surgery.exchange.heads import exchange_to_heads, exchange_to_sequence
from tests.golden import check_golden
from tests.passes.attending import CONVERTED, attend, causal
from tests.tracing import operate, trace


def calls(graph: fx.Graph, target: object) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))  # type: ignore[arg-type]


def test_golden() -> None:
    done = operate(InsertAllToAll(), causal(), prepared_by=CONVERTED)
    check_golden("insert_all_to_all.txt", str(done))
    assert done.result.changed == 1


def test_one_pair_a_site() -> None:
    module = trace(lambda q, k: attend(attend(q * 2, k * 2), k * 3), "b 8 s 4", "b 4 s 4")
    done = operate(InsertAllToAll(), module, prepared_by=CONVERTED, size=8)
    assert done.result.changed == 2
    assert len(calls(done.graph, exchange_to_heads)) == len(calls(done.graph, exchange_to_sequence)) == 2


def test_leaves_alone_calls_over_whole_tokens() -> None:
    module = trace(lambda x, q: (attend(q, q), x * 2), "b s 6", "b 8 3 4")
    done = operate(InsertAllToAll(), module, prepared_by=CONVERTED)
    assert done.result.changed == 0
    assert done.before == done.after
    assert [skip.reason for skip in done.result.skips] == ["its tokens are whole on every rank: nothing to exchange"]
