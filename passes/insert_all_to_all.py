"""Put the exchange around every attention call.

    q, k, v [B, N, S/P, H]  --exchange_to_heads-->     [B, N/P, S, H]      one all-to-all, packed
    out     [B, N/P, S, H]  --exchange_to_sequence-->  [B, N, S/P, H]      one all-to-all

Cross-attention has queries of T tokens and keys of S: two packets on the way there (`surgery/cross_exchange.py`).

Inside, a rank sees the whole sequence for its own heads, so attention itself is computed as if there were one device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
from torch import fx

from surgery.cross_exchange import exchange_keys, exchange_queries, take_own_keys
from surgery.exchange import exchange_to_heads, exchange_to_sequence
from surgery.metadata import KEY, Context, NodeFacts, Site, Skip, facts_of
from surgery.pipeline import PassResult
from surgery.placement import REPLICATED, HeadSharded, Sharded
from surgery.rules.attention import SEQUENCE_DIM
from surgery.shapes import shape_of
from surgery.sizes import size_node

TOKENS = 3  # query, key and value lead the arguments of an attention call


@dataclass(frozen=True)
class InsertAllToAll:
    name: ClassVar[str] = "insert-all-to-all"
    requires: ClassVar[frozenset[str]] = frozenset({"sites", "converted"})
    provides: ClassVar[frozenset[str]] = frozenset({"exchanged"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        sites = [site for site in context.sites if isinstance(facts_of(site.node).placement, Sharded)]
        whole = [site for site in context.sites if site not in sites]
        for site in sites:
            exchange(graph, site, context)
        reason = "its tokens are whole on every rank: nothing to exchange"
        return PassResult(len(sites), tuple(Skip(site.module_path, reason) for site in whole))


def exchange(graph: fx.Graph, site: Site, context: Context) -> None:
    """Insert the all-to-alls around one attention call."""
    call = site.node
    query, key, value = tokens = [arg for arg in call.args[:TOKENS] if isinstance(arg, fx.Node)]
    with graph.inserting_before(call):
        length, key_length = (size_node(graph, _length(source), context.sizes) for source in (query, key))
        if length is key_length:
            heads = _send(exchange_to_heads, tokens, (*tokens, length), call, context)
        else:
            own = graph.call_function(exchange_queries, (query, length), {"axis": context.axis})
            _describe(own, query, call)
            is_whole = facts_of(key).placement == REPLICATED
            send, extra = (take_own_keys, ()) if is_whole else (exchange_keys, (key_length,))
            heads = [own, *_send(send, [key, value], (key, value, site.num_heads, *extra), call, context)]
    call.args = (*heads, *call.args[TOKENS:])
    with graph.inserting_after(call):
        output = graph.call_function(exchange_to_sequence, (call, site.num_heads), {"axis": context.axis})
    call.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)
    output.meta = {**call.meta, KEY: NodeFacts(facts_of(call).placements, "exchange")}
    call.meta[KEY] = NodeFacts((HeadSharded(),), "attention")


def _length(source: fx.Node) -> sympy.Expr:
    return shape_of(source.meta["val"])[SEQUENCE_DIM]


def _send(
    function: Callable[..., Any], sources: list[fx.Node], args: tuple[Any, ...], call: fx.Node, context: Context
) -> list[fx.Node]:
    """Call `function`, and take its results apart: what this rank has of `sources`."""
    packed = call.graph.call_function(function, args, {"axis": context.axis})
    heads = [call.graph.call_function(operator.getitem, (packed, i)) for i in range(len(sources))]
    for source, head in zip(sources, heads, strict=True):
        _describe(head, source, call)
    packed.meta = {**call.meta, "val": tuple(head.meta["val"] for head in heads)}
    packed.meta[KEY] = NodeFacts((HeadSharded(),) * len(heads), "exchange")
    return heads


def _describe(head: fx.Node, source: fx.Node, call: fx.Node) -> None:
    head.meta = {**call.meta, "val": source.meta["val"]}
    head.meta[KEY] = NodeFacts((HeadSharded(),), "exchange")
