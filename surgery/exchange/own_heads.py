"""The heads that this rank has inside an exchange, and what of a call belongs to them.

    mask [B, N, S, S], sinks [N]   ->   [B, N/P, S, S], [N/P]       cut to this rank's heads
    module.num_key_value_groups    ->   N/P over the KV heads that are here
    module.sinks [N]               ->   [N/P]

A registered attention function is called as it would be on one device, only with fewer heads: it is given a
`HeadView` of its module in place of the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from surgery.errors import CaptureError

QUERY_HEADS = frozenset({"num_heads", "num_attention_heads", "n_head", "n_heads"})
KV_HEADS = frozenset({"num_key_value_heads", "num_kv_heads"})
PER_HEAD = {"s_aux": 0, "position_bias": 1}
"""Keywords of attention calls that have an entry for each head, and in which dimension."""
PER_ROW = {"position_bias": 2}
"""Those that have one for each query too."""
WITHOUT_HEADS = frozenset({"position_ids", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens"})


def cut_run(x: Tensor, dim: int, first: int, count: int) -> Tensor:
    """An operand with an entry for each head, or query, cut to a run of `count`; one that all share as it is."""
    return x if x.shape[dim] in (1, count) else x.narrow(dim, first, count)


@dataclass(frozen=True)
class OwnHeads:
    """This rank's run of the query heads, of how many in all, and the key and value heads that it was sent."""

    first: int
    count: int
    kv_count: int
    total: int
    total_kv: int

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """An operand with an entry for each head cut to this rank's; one that all heads share as it is."""
        return cut_run(x, dim, self.first, self.count)

    def cut_mask(self, mask: Any) -> Any:
        """A mask [B, N, S, S] or [B, 1, S, S], as a tensor or in blocks; padding [B, S] is shared by all heads."""
        if isinstance(mask, BlockMask) and mask.kv_num_blocks.shape[1] not in (1, self.count):
            own = mask[:, self.first : self.first + self.count]
            own.mask_mod = mask.mask_mod
            return own
        return self.cut(mask, 1) if isinstance(mask, Tensor) and mask.ndim == 4 else mask

    def cut_keywords(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call, those with an entry for each head cut to this rank's."""
        given = {name: dim for name, dim in PER_HEAD.items() if isinstance(keywords.get(name), Tensor)}
        return {**keywords, **{name: self.cut(keywords[name], dim) for name, dim in given.items()}}


class HeadView:
    """A module as its attention function may see it on one rank: with this rank's heads only.

    Counts of heads, and tensors that have one entry for each, are this rank's; everything else is the module's own.
    Raises `CaptureError` where a tensor has a dimension as long as there are heads, and it is not the first.
    """

    def __init__(self, module: nn.Module, heads: OwnHeads) -> None:
        self.viewed_module = module
        self.own_heads = heads

    def __getattr__(self, name: str) -> Any:
        value, heads = getattr(self.viewed_module, name), self.own_heads
        if name == "num_key_value_groups":
            return heads.count // heads.kv_count
        if name in QUERY_HEADS:
            return heads.count
        if name in KV_HEADS:
            return heads.kv_count
        return _own_entries(value, name, heads) if isinstance(value, Tensor) else value


def _own_entries(value: Tensor, name: str, heads: OwnHeads) -> Tensor:
    counts = (heads.total, heads.total_kv)
    if heads.total == heads.count or not any(size in counts for size in value.shape):
        return value
    if value.shape[0] == heads.total and not any(size in counts for size in value.shape[1:]):
        return heads.cut(value, 0)
    raise CaptureError(
        f"the attention function reads {name} of its module, of shape {tuple(value.shape)}, which may have entries for "
        f"{heads.total} heads. Expected them in the first dimension only. Pass it to the function as a keyword, or "
        "load the model with another attention implementation."
    )
