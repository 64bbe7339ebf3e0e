"""Take from masks what says nothing, so that plain causal attention stays plain.

    documents of positions 0, 1, 2, ...     one document: dropped
    attention_mask(causal, nothing else)    -> no mask, is_causal=True: no S x S tensor

A traced model cannot look at its positions, so transformers always adds the mask that keeps packed documents apart.
Where the graph itself counts the positions up one by one there is a single document, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from transformers.masking_utils import sdpa_mask

from passes.locate_attention import read_mask
from surgery.attention.operators import ATTENTION, MASK
from surgery.metadata import Context
from surgery.pipeline import PassResult
from surgery.rules.call import bind_arguments, set_argument
from surgery.rules.table import is_call
from surgery.shapes import shape_of

LAST_OF_TWO = (-1, 1)
DOCUMENTS_OF_POSITIONS: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
    ("aten::cumsum", lambda given: given["dim"] in LAST_OF_TWO),
    ("aten::ne", lambda given: given["other"] == 1),
    ("aten::diff", lambda given: given["n"] == 1 and given["dim"] in LAST_OF_TWO and given["append"] is None),
)
WORDS = ("padding", "documents", "window", "reach", "chunk_size", "blocks", "drawn")


@dataclass(frozen=True)
class SimplifyMasks:
    name: ClassVar[str] = "simplify-masks"
    requires: ClassVar[frozenset[str]] = frozenset({"sites"})
    provides: ClassVar[frozenset[str]] = frozenset({"simple-masks"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        trivial = find_single_documents(graph)
        for mask in trivial:
            for word in ("documents", "positions"):
                if bind_arguments(mask)[word] is not None:
                    set_argument(mask, word, None)
        plain = find_plain_masks(graph, context)
        for node, mask in plain.items():
            set_argument(node, "mask", None)
            set_argument(node, "is_causal", bind_arguments(mask)["is_causal"])
        for site in context.sites:
            site.mask = read_mask(site.node, context)
        return PassResult(len(trivial) + len(plain))


def find_single_documents(graph: fx.Graph) -> list[fx.Node]:
    """Masks whose documents come from positions that the graph counts up one by one."""
    masks = graph.find_nodes(op="call_function", target=MASK)
    documents = {mask: bind_arguments(mask)["documents"] for mask in masks}
    return [mask for mask, node in documents.items() if isinstance(node, fx.Node) and _is_one_document(node)]


def find_plain_masks(graph: fx.Graph, context: Context) -> dict[fx.Node, fx.Node]:
    """Attention calls whose mask describes nothing but causality, or nothing at all, with that mask.

    Only where sdpa's mask function would draw it: eager attention and flex take no mask for "all tokens see all".
    """
    calls = graph.find_nodes(op="call_function", target=ATTENTION)
    described = {node: bind_arguments(node)["mask"] for node in calls}
    masks = {node: mask for node, mask in described.items() if isinstance(mask, fx.Node) and mask.target is MASK}
    return {node: mask for node, mask in masks.items() if _is_plain(mask) and _is_skippable(mask, context)}


def _is_skippable(mask: fx.Node, context: Context) -> bool:
    maker = bind_arguments(mask)["maker"]
    record = context.masks[maker] if maker is not None else None
    return record is None or (record.function is sdpa_mask and record.lifted is None)


def _is_plain(mask: fx.Node) -> bool:
    given = bind_arguments(mask)
    is_square = given["query_length"] is given["key_length"] or not given["is_causal"]
    return is_square and all(given[name] is None for name in WORDS)


def _is_one_document(documents: fx.Node) -> bool:
    """Whether `documents` is cumsum(diff(positions) != 1) of consecutive positions."""
    node: Any = documents
    for operation, meaning in DOCUMENTS_OF_POSITIONS:
        if not is_call(node, operation) or not meaning(bind_arguments(node)):
            return False
        node = node.args[0]
    return _is_consecutive(node)


def _is_consecutive(node: Any) -> bool:
    """Whether a value is an `arange` by ones along its last dimension, shifted or broadcast."""
    if is_call(node, "aten::arange"):
        return bind_arguments(node).get("step", 1) == 1
    if is_call(node, "aten::add"):
        first, second = node.args[:2]
        return isinstance(second, int) and _is_consecutive(first)
    if any(is_call(node, f"aten::{name}") for name in ("unsqueeze", "expand", "to")):
        source = node.args[0]
        has_same_rows = shape_of(source.meta["val"])[-1:] == shape_of(node.meta["val"])[-1:]
        return has_same_rows and _is_consecutive(source)
    return False
