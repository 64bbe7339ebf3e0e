"""Put the exchange around every attention call.

    q, k, v [B, N, S/P, H]  --exchange_to_heads-->     [B, N/P, S, H]      one all-to-all, packed
    out     [B, N/P, S, H]  --exchange_to_sequence-->  [B, N, S/P, H]      one all-to-all

Cross-attention has queries of T tokens and keys of S: two packets on the way there (`surgery/exchange/cross.py`).
With more ranks than heads, those of one head share its queries (`surgery/exchange/rows.py`).

Inside, a rank sees the whole sequence for its own heads, so attention itself is computed as if there were one device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
from torch import fx

from surgery.exchange.cross import exchange_keys, exchange_queries, take_own_keys
from surgery.exchange.heads import exchange_to_heads, exchange_to_sequence
from surgery.exchange.row_sharing import why_rows_stay_whole
from surgery.exchange.rows import exchange_from_rows, exchange_to_rows
from surgery.metadata import KEY, Context, NodeFacts, Site, Skip, facts_of
from surgery.pipeline import PassResult
from surgery.placement import REPLICATED, HeadSharded, RowSharded, Sharded
from surgery.rules.attention import SEQUENCE_DIM
from surgery.shapes import shape_of
from surgery.sizes import Size, size_node

TOKENS = 3  # query, key and value lead the arguments of an attention call


@dataclass(frozen=True)
class InsertAllToAll:
    name: ClassVar[str] = "insert-all-to-all"
    requires: ClassVar[frozenset[str]] = frozenset({"sites", "converted"})
    provides: ClassVar[frozenset[str]] = frozenset({"exchanged"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        sites = [site for site in context.sites if isinstance(facts_of(site.node).placement, Sharded)]
        reason = "its tokens are whole on every rank: nothing to exchange"
        skips = [Skip(site.module_path, reason) for site in context.sites if site not in sites]
        for site in sites:
            skips += share_rows(site, context)
            exchange(graph, site, context)
        return PassResult(len(sites), tuple(skips))


def share_rows(site: Site, context: Context) -> list[Skip]:
    """Of more ranks than heads, let those of one head share its queries, or say why they do not."""
    if site.num_heads >= context.axis.size:
        return []
    reason = why_rows_stay_whole(site, context)
    site.shares_rows = reason is None
    idle = f"{context.axis.size - site.num_heads} of {context.axis.size} ranks wait for its {site.num_heads} heads"
    return [] if reason is None else [Skip(site.module_path, f"{idle}: {reason}")]


def exchange(graph: fx.Graph, site: Site, context: Context) -> None:
    """Insert the all-to-alls around one attention call."""
    call = site.node
    tokens = [arg for arg in call.args[:TOKENS] if isinstance(arg, fx.Node)]
    with graph.inserting_before(call):
        length, key_length = (size_node(graph, _length(source), context.sizes) for source in tokens[:2])
        heads = _exchange_tokens(site, tokens, length, key_length, context)
    call.args = (*heads, *call.args[TOKENS:])
    send_home: Callable[..., Any] = exchange_from_rows if site.shares_rows else exchange_to_sequence
    sizes = (site.num_heads, length) if site.shares_rows else (site.num_heads,)
    with graph.inserting_after(call):
        output = graph.call_function(send_home, (call, *sizes), {"axis": context.axis})
    call.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)
    output.meta = {**call.meta, KEY: NodeFacts(facts_of(call).placements, "exchange")}
    call.meta[KEY] = NodeFacts((RowSharded() if site.shares_rows else HeadSharded(),), "attention")


def _exchange_tokens(
    site: Site, tokens: list[fx.Node], length: Size, key_length: Size, context: Context
) -> list[fx.Node]:
    """What this rank attends with: its heads, or its rows of one, of query, key and value."""
    query, key, value = tokens
    if site.shares_rows:
        return _send(exchange_to_rows, tokens, (*tokens, length, key_length), site, context)
    if length is key_length:
        return _send(exchange_to_heads, tokens, (*tokens, length), site, context)
    own = site.node.graph.call_function(exchange_queries, (query, length), {"axis": context.axis})
    _describe(own, query, site)
    is_whole = facts_of(key).placement == REPLICATED
    send, extra = (take_own_keys, ()) if is_whole else (exchange_keys, (key_length,))
    return [own, *_send(send, [key, value], (key, value, site.num_heads, *extra), site, context)]


def _length(source: fx.Node) -> sympy.Expr:
    return shape_of(source.meta["val"])[SEQUENCE_DIM]


def _send(
    function: Callable[..., Any], sources: list[fx.Node], args: tuple[Any, ...], site: Site, context: Context
) -> list[fx.Node]:
    """Call `function`, and take its results apart: what this rank has of `sources`."""
    call = site.node
    packed = call.graph.call_function(function, args, {"axis": context.axis})
    heads = [call.graph.call_function(operator.getitem, (packed, i)) for i in range(len(sources))]
    for source, head in zip(sources, heads, strict=True):
        _describe(head, source, site)
    packed.meta = {**call.meta, "val": tuple(head.meta["val"] for head in heads)}
    packed.meta[KEY] = NodeFacts(tuple(facts_of(head).placement for head in heads), "exchange")
    return heads


def _describe(head: fx.Node, source: fx.Node, site: Site) -> None:
    head.meta = {**site.node.meta, "val": source.meta["val"]}
    is_cut = site.shares_rows and source is site.node.args[0]
    head.meta[KEY] = NodeFacts((RowSharded() if is_cut else HeadSharded(),), "exchange")
