"""Put the exchange around every attention call.

    q, k, v [B, N, S/P, H]  --exchange_to_heads-->     [B, N/P, S, H]      one all-to-all, packed
    out     [B, N/P, S, H]  --exchange_to_sequence-->  [B, N, S/P, H]      one all-to-all

Inside, a rank sees the whole sequence for its own heads, so attention itself is computed as if there were one device.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from surgery.exchange import exchange_to_heads, exchange_to_sequence
from surgery.metadata import KEY, Context, NodeFacts, Site, Skip, facts_of
from surgery.pipeline import PassResult
from surgery.placement import HeadSharded, Sharded
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
    """Insert the pair of all-to-alls around one attention call."""
    call = site.node
    tokens = [arg for arg in call.args[:TOKENS] if isinstance(arg, fx.Node)]
    with graph.inserting_before(call):
        length = size_node(graph, shape_of(call.meta["val"])[SEQUENCE_DIM], context.sizes)
        packed = graph.call_function(exchange_to_heads, (*tokens, length), {"axis": context.axis})
        heads = [graph.call_function(operator.getitem, (packed, i)) for i in range(TOKENS)]
    for source, head in zip(tokens, heads, strict=True):
        _describe(head, source, call)
    packed.meta = {**call.meta, "val": tuple(head.meta["val"] for head in heads)}
    packed.meta[KEY] = NodeFacts((HeadSharded(),) * TOKENS, "exchange")
    call.args = (*heads, *call.args[TOKENS:])
    with graph.inserting_after(call):
        output = graph.call_function(exchange_to_sequence, (call, site.num_heads), {"axis": context.axis})
    call.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)
    output.meta = {**call.meta, KEY: NodeFacts(facts_of(call).placements, "exchange")}
    call.meta[KEY] = NodeFacts((HeadSharded(),), "attention")


def _describe(head: fx.Node, source: fx.Node, call: fx.Node) -> None:
    head.meta = {**call.meta, "val": source.meta["val"]}
    head.meta[KEY] = NodeFacts((HeadSharded(),), "exchange")
