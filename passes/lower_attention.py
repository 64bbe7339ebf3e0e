"""Replace each attention call and mask description by the implementation that runs.

attention(q, k, v, None, causal)              ->  sdpa(q, k, v, None, is_causal=True)    no S x S tensor
attention(q, k, v, attention_mask(window))    ->  sdpa(q, k, v, build_mask(window))      one mask, shared by layers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.locate_attention import MASK
from surgery.errors import UnsupportedOperationError
from surgery.implementations import IMPLEMENTATIONS, build_mask
from surgery.metadata import Context, Site
from surgery.pipeline import PassResult
from surgery.rules.call import bind_arguments


@dataclass(frozen=True)
class LowerAttention:
    name: ClassVar[str] = "lower-attention"
    requires: ClassVar[frozenset[str]] = frozenset({"exchanged"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: fx.Graph, context: Context) -> PassResult:
        for site in context.sites:
            lower_site(site, context)
        masks = graph.find_nodes(op="call_function", target=MASK)
        for mask in masks:
            lower_mask(mask)
        return PassResult(len(context.sites) + len(masks))


def lower_site(site: Site, context: Context) -> None:
    """Call the site's implementation on this rank's heads."""
    given = bind_arguments(site.node)
    check_mask(site, given["mask"])
    is_causal = site.mask.is_causal if site.mask is not None else given["is_causal"]
    site.node.target = IMPLEMENTATIONS[site.implementation]
    site.node.args = tuple(given[name] for name in ("query", "key", "value", "mask", "dropout", "scale"))
    extras = {name: given[name] for name in ("softcap", "sinks")} if site.implementation == "eager" else {}
    site.node.kwargs = {"is_causal": is_causal, "axis": context.axis, **extras}


def check_mask(site: Site, mask: fx.Node | None) -> None:
    """Refuse masks that are neither shared by all heads nor given for each of them."""
    shape = mask.meta["val"].shape if mask is not None else (1, 1, 1, 1)
    if len(shape) != 4 or shape[1] not in (1, site.num_heads):
        raise UnsupportedOperationError(
            f"lower-attention: a mask of shape {tuple(shape)} at {site.module_path}. "
            f"Expected [B, 1, S, S], or [B, {site.num_heads}, S, S] with one for each head."
        )


def lower_mask(mask: fx.Node) -> None:
    """Build the mask when the graph runs, once for all calls that share it."""
    given = bind_arguments(mask)
    only_attention = all(user.target in IMPLEMENTATIONS.values() for user in mask.users)
    mask.target = build_mask
    mask.args = ()
    mask.kwargs = {**given, "may_skip": only_attention}
