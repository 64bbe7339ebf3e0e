"""Replace each attention call and mask description by the implementation that runs.

attention(q, k, v, None, causal)              ->  sdpa(q, k, v, None, is_causal=True)    no S x S tensor
attention(q, k, v, attention_mask(window))    ->  sdpa(q, k, v, make_mask(window))       one mask, shared by layers
attention(q, k, v, None, call 3)              ->  flash_attention_forward(q, k, v, None, module, {scaling: ...})
attention(rows of q, k, v, None, causal)      ->  sdpa(q, k, v, causal_rows)             where ranks share a head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from surgery.attention.implementations import registered, sdpa, sdpa_refuses_soft_caps, written_out
from surgery.attention.mask_making import TORCH_SDPA, mask_maker, may_be_left_out
from surgery.attention.operators import MASK
from surgery.attention.recorded import TENSOR_MASKS, RecordedMask
from surgery.capture.opaque import OPAQUE
from surgery.errors import UnsupportedOperationError
from surgery.exchange.own_heads import PER_ROW
from surgery.exchange.own_rows import causal_rows, own_rows
from surgery.metadata import KEY, Context, NodeFacts, Site
from surgery.pipeline import PassResult
from surgery.placement import RowSharded
from surgery.rules.attention import SEQUENCE_DIM
from surgery.rules.call import bind_arguments
from surgery.shapes import shape_of
from surgery.sizes import Size, size_node

MASK_PLACE = 3  # in the arguments of an implementation
CONSTANTS = (fx.Node, str, int, float, bool, type(None), torch.dtype, torch.device)
"""What the arguments of a graph's node may be made of."""


@dataclass(frozen=True)
class LowerAttention:
    name: ClassVar[str] = "lower-attention"
    requires: ClassVar[frozenset[str]] = frozenset({"exchanged"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        for site in context.sites:
            lower_site(graph, site, context)
        calls = {site.node for site in context.sites}
        masks = graph.find_nodes(op="call_function", target=MASK)
        for mask in masks:
            lower_mask(mask, calls, context)
        return PassResult(len(context.sites) + len(masks))


def lower_site(graph: fx.Graph, site: Site, context: Context) -> None:
    """Call the site's implementation on this rank's heads."""
    given = bind_arguments(site.node)
    check_mask(site, given["mask"])
    is_causal = site.mask.is_causal if site.mask is not None else given["is_causal"]
    tokens = tuple(given[name] for name in ("query", "key", "value", "mask"))
    keywords = site.call.keywords(given["extras"], given["sizes"]) if site.call is not None else {}
    softcap = keywords.get("softcap") if sdpa_refuses_soft_caps() else None
    extras = {"softcap": softcap, "sinks": keywords.get("s_aux")}
    is_extended = any(value is not None for value in extras.values())
    site.node.kwargs = {"is_causal": is_causal, "axis": context.axis}
    if site.call is None or (site.call.function is sdpa_attention_forward and keywords.get("position_bias") is None):
        site.node.target = written_out if is_extended else sdpa
        site.node.args = (*tokens, given["dropout"], given["scale"])
        more = extras if is_extended else {"is_broadcast": True} if site.is_broadcast else {}
        site.node.kwargs = {**site.node.kwargs, **more}
    else:
        shown = {name: value for name, value in keywords.items() if _is_constant(value)}
        hidden = {name: value for name, value in keywords.items() if name not in shown}
        with graph.inserting_before(site.node):
            module = graph.create_node("get_attr", site.call.module_path)
        site.node.target = registered(site.call, hidden)
        site.node.args = (*tokens, module, shown)
    if site.shares_rows:
        cut_to_rows(graph, site, given, context)


def cut_to_rows(graph: fx.Graph, site: Site, given: dict[str, Any], context: Context) -> None:
    """Give a call that attends for some queries only the rows of its mask, and of a bias, for those."""
    call = site.node
    with graph.inserting_before(call):
        length = size_node(graph, shape_of(given["query"].meta["val"])[SEQUENCE_DIM], context.sizes)
        mask = given["mask"]
        if mask is not None:
            mask = _own_rows(mask, SEQUENCE_DIM, length, site, context)
        elif call.kwargs["is_causal"] and (site.call is None or site.call.function is sdpa_attention_forward):
            mask = _causal_rows(given["query"], given["key"], length, site, context)
        rest = [_cut_keywords(arg, length, site, context) for arg in call.args[MASK_PLACE + 1 :]]
    call.args = (*call.args[:MASK_PLACE], mask, *rest)


def _own_rows(x: fx.Node, dim: int, length: Size, site: Site, context: Context) -> fx.Node:
    rows = site.node.graph.call_function(own_rows, (x, dim, site.num_heads, length), {"axis": context.axis})
    rows.meta = {**x.meta, KEY: NodeFacts((RowSharded(),), "conversion")}
    return rows


def _cut_keywords(arg: Any, length: Size, site: Site, context: Context) -> Any:
    if not isinstance(arg, dict):
        return arg
    cut = {name: dim for name, dim in PER_ROW.items() if isinstance(arg.get(name), fx.Node)}
    return {**arg, **{name: _own_rows(arg[name], dim, length, site, context) for name, dim in cut.items()}}


def _causal_rows(query: fx.Node, key: fx.Node, length: Size, site: Site, context: Context) -> fx.Node:
    """The mask that stands for `is_causal`, made once for all calls of as many heads and keys."""
    wanted = (site.num_heads, length, key.meta["val"].shape[SEQUENCE_DIM])
    for made in site.node.graph.find_nodes(op="call_function", target=causal_rows):
        if (*made.args[1:], made.meta["val"].shape[-1]) == wanted:
            return made
    rows = site.node.graph.call_function(causal_rows, (key, site.num_heads, length), {"axis": context.axis})
    shape = (1, 1, query.meta["val"].shape[SEQUENCE_DIM], wanted[-1])
    rows.meta = {**site.node.meta, "val": key.meta["val"].new_empty(shape, dtype=torch.bool)}
    rows.meta[KEY] = NodeFacts((RowSharded(),), "conversion")
    return rows


def _is_constant(value: Any) -> bool:
    return all(isinstance(leaf, CONSTANTS) for leaf in pytree.tree_leaves(value))


def check_mask(site: Site, mask: Any) -> None:
    """Refuse masks that are neither shared by all heads nor given for each of them."""
    shape = mask.meta["val"].shape if isinstance(mask, fx.Node) else (1, 1, 1, 1)
    if len(shape) != 2 and (len(shape) != 4 or shape[1] not in (1, site.num_heads)):
        raise UnsupportedOperationError(
            f"lower-attention: a mask of shape {tuple(shape)} at {site.module_path}. "
            f"Expected [B, 1, S, S], or [B, {site.num_heads}, S, S] with one for each head."
        )


def lower_mask(mask: fx.Node, calls: set[fx.Node], context: Context) -> None:
    """Make the mask when the graph runs, once for all `calls` that share it: they take None for "nothing to mask".

    So do modules that are called live, which the unsharded model gives None as well.
    """
    given = bind_arguments(mask)
    record = context.masks[given["maker"]] if given["maker"] is not None else TORCH_SDPA
    modules = [user for user in mask.users if user.target is OPAQUE]
    rows = [user for user in mask.users if user.target is own_rows]
    others = [user for user in mask.users if user not in {*calls, *modules, *rows}]
    if others and record.function not in TENSOR_MASKS:
        raise UnsupportedOperationError(
            f"lower-attention: the model computes {others[0].target} with the mask of {record.implementation!r}. "
            'Expected it to reach the attention calls as it is. Load the model with attn_implementation="sdpa".'
        )
    if others and _is_left_out(record, given):
        raise UnsupportedOperationError(
            f"lower-attention: the model computes {others[0].target} with a mask of {record.implementation!r} that "
            "transformers leaves out (None) where nothing is padded, and may compute something else then. Expected a "
            "mask that is always there. Make it with allow_is_causal_skip=False, or load the model with "
            'attn_implementation="eager".'
        )
    words = {name: value for name, value in given.items() if value is not None}
    for name in ("dtype", "is_padding", "maker"):
        words.pop(name, None)
    mask.target = mask_maker(record)
    mask.args = ()
    mask.kwargs = {**words, "may_skip": not others and not rows, "is_asked_for": bool(modules)}


def _is_left_out(record: RecordedMask, given: dict[str, Any]) -> bool:
    """Whether the unsharded model may have None in place of a mask that it does not add to scores as it is.

    A mask that is not causal hides nothing where it is left out, and is taken to be used so.
    """
    if record.function is flash_attention_mask:
        return given["padding"] is not None
    return record.function is sdpa_mask and given["is_causal"] and may_be_left_out(record, is_causal=True)
