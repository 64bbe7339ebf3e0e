"""Find the attention calls and what each may see.

surgery::attention(q, k, v, mask)               -> a site, its mask read from surgery::attention_mask
aten::scaled_dot_product_attention(q, k, v)     -> surgery::attention(q, k, v), for models that call it themselves
the same without a dimension for heads          -> an operation like any other, which is computed whole on every rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from surgery.attention.operators import ATTENTION, MASK
from surgery.errors import UnsupportedOperationError
from surgery.metadata import Context, Mask, Site, Skip, module_path, source_line, where
from surgery.pipeline import PassResult
from surgery.rules.call import bind_arguments
from surgery.shapes import shape_of

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class LocateAttention:
    name: ClassVar[str] = "locate-attention"
    requires: ClassVar[frozenset[str]] = frozenset({"flat"})
    provides: ClassVar[frozenset[str]] = frozenset({"sites"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        direct = list(graph.find_nodes(op="call_function", target=SDPA))
        headless = [node for node in direct if not has_heads(node)]
        skips = tuple(Skip(module_path(node), "expected query, key and value [B, N, S, H]") for node in headless)
        adopted = [(is_broadcast(node), adopt(graph, node)) for node in direct if node not in headless]
        broadcast = {call for is_so, call in adopted if is_so}
        context.sites = find_sites(graph, context)
        for site in context.sites:
            site.is_broadcast = site.node in broadcast
            check_extras(site)
        if context.has_document_ends:
            check_documents(graph, context.sites)
        return PassResult(len(direct) - len(headless), skips)


def has_heads(node: fx.Node) -> bool:
    """Whether query, key and value are [B, N, S, H], [B, Nk, S, H] of fixed sizes but B and S, and Nk divides N.

    A single key head is that of all, whether it is told to be repeated or broadcast. What else a model may attend over
    are no heads, or are broadcast.
    """
    given = bind_arguments(node)
    query, key, value = (shape_of(given[name].meta["val"]) for name in ("query", "key", "value"))
    if not all(len(shape) == 4 and shape[1].is_Integer and shape[3].is_Integer for shape in (query, key, value)):
        return False
    repeats = given.get("enable_gqa", True)
    are_grouped = key[1] == 1 or (query[1] % key[1] == 0 if repeats else query[1] == key[1])
    return bool(are_grouped) and key[:2] == value[:2] and query[0] == key[0]


def is_broadcast(node: fx.Node) -> bool:
    """Whether torch is to broadcast one key head to several query heads."""
    given = bind_arguments(node)
    query, key = (shape_of(given[name].meta["val"]) for name in ("query", "key"))
    return bool(query[1] != key[1]) and not given["enable_gqa"]


def adopt(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Turn a model's own `scaled_dot_product_attention` into an attention call like any other: the call."""
    given = bind_arguments(node)
    arguments = (given["query"], given["key"], given["value"], given["attn_mask"])
    with graph.inserting_before(node):
        options = (given["dropout_p"], given["scale"], given["is_causal"])
        call = graph.call_function(ATTENTION, (*arguments, *options, [], []))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return call


def find_sites(graph: fx.Graph, context: Context) -> list[Site]:
    """The attention calls of the graph, in order."""
    calls = graph.find_nodes(op="call_function", target=ATTENTION)
    for call in calls:
        if not has_heads(call):
            raise UnsupportedOperationError(
                f"{where(call)}: expected query, key and value [B, N, S, H] and a multiple of their heads in the "
                "query. Transpose or expand them before the attention function."
            )
    return [_site(call, context) for call in calls]


def _site(node: fx.Node, context: Context) -> Site:
    given = bind_arguments(node)
    query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
    return Site(
        node=node,
        module_path=module_path(node),
        source_line=source_line(node),
        num_heads=int(query.shape[1]),
        num_kv_heads=int(key.shape[1]),
        head_size=int(query.shape[3]),
        value_head_size=int(value.shape[3]),
        element_size_bytes=query.element_size(),
        dropout=given["dropout"],
        mask=read_mask(node, context),
        call=context.calls[given["call"]] if given["call"] is not None else None,
    )


def read_mask(call: fx.Node, context: Context) -> Mask | None:
    """The description of an attention call's mask, or None where the model built the tensor itself."""
    given = bind_arguments(call)
    mask, record = given["mask"], context.calls[given["call"]] if given["call"] is not None else None
    kernel_window = record.window if record is not None else None
    if mask is None:
        return Mask(given["is_causal"], kernel_window)
    if mask.target is not MASK:
        return None
    given = bind_arguments(mask)
    if given["drawn"] is not None or (given["maker"] is not None and context.masks[given["maker"]].lifted is not None):
        return None
    names = {name: given[name].name if given[name] is not None else None for name in ("padding", "documents", "blocks")}
    sizes = {name: given[name] for name in ("reach", "chunk_size")}
    return Mask(given["is_causal"], kernel_window or given["window"], **sizes, **names)


def check_extras(site: Site) -> None:
    """Refuse calls that are given their query, key or value a second time: it would stay a shard."""
    given = bind_arguments(site.node)
    if {given[name] for name in ("query", "key", "value")} & {given["mask"], *given["extras"]}:
        raise UnsupportedOperationError(
            f"{where(site.node)}: the query, key or value is passed again as a mask or keyword. Expected it once. "
            "Use an architecture that does so."
        )


def check_documents(graph: fx.Graph, sites: list[Site]) -> None:
    """Refuse cu_seq_lens_* where neither the mask nor the attention function keeps the documents apart."""
    masks = [mask for mask in graph.find_nodes(op="call_function", target=MASK) if mask.args[1] is not None]
    blind = [site for site in sites if site.call is None or not site.call.reads_document_ends]
    unread = [site.node for site in blind if bind_arguments(site.node)["mask"] not in masks]
    unread += graph.find_nodes(op="call_function", target=SDPA)
    if unread or not (masks or sites):
        place = module_path(unread[0]) if unread else "the model's own attention"
        raise UnsupportedOperationError(
            f"locate-attention: cu_seq_lens_q is given, and {place} would attend across documents: expected a mask of "
            "transformers' masking_utils, or an attention function that reads it. Pass position_ids that start again "
            "with each document, or a mask [B, 1, S, S]."
        )
