"""What a rank's slices say of the whole: which of its tokens are padding, and whether documents are kept apart.

    mask [B, S/P]           padding                           documents are not told apart
    mask [B, 1, S/P, S/P]   its diagonal is the padding       drawn anew in both ways: which one is it?
    no mask                 everything is seen                documents are told apart by positions that start again

A block that is more than causality, a window, padding and documents says nothing of other ranks' tokens: a problem,
which all ranks raise together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from surgery.attention.mask_making import TORCH_SDPA, mask_maker
from surgery.errors import InputError
from surgery.inputs.sharded_inputs import Runs

UNKNOWN, SEPARATE, JOINED = 0, 1, 2


class Pattern(NamedTuple):
    """Which keys a query sees: `is_causal` those behind it, `window` at most so many back."""

    is_causal: bool
    window: int | None


def draw(
    pattern: Pattern, length: int, device: torch.device, padding: Tensor | None, documents: Tensor | None
) -> Tensor:
    """The boolean mask [B, 1, S, S] of a pattern: True where a query sees a key."""
    given = padding if padding is not None else documents
    mask: Tensor = mask_maker(TORCH_SDPA)(
        batch_size=1 if given is None else given.shape[0],
        query_length=length,
        key_length=length,
        device=device,
        may_skip=False,
        is_asked_for=False,
        lifted=[],
        padding=padding.bool() if padding is not None else None,
        documents=documents,
        **pattern._asdict(),
    )
    return mask


class Said(NamedTuple):
    """What a rank's arguments say of its own tokens; `problem` is what they do not say."""

    padding: Tensor
    documents: int = UNKNOWN
    problem: str | None = None


def read_slices(mask: Tensor | None, positions: Tensor | None, pattern: Pattern, query: Tensor) -> Said:
    """What a mask of any of the shapes above, and positions [B, S/P], say of this rank's tokens."""
    batch_size, length = query.shape[0], query.shape[2]
    documents = None if positions is None else find_packed_sequence_indices(positions)
    everything = torch.ones(batch_size, length, dtype=torch.long, device=query.device)
    if mask is None:
        return Said(everything, SEPARATE if documents is not None else UNKNOWN)
    if mask.ndim == 2:
        return Said(mask.long(), JOINED)
    return read_block(mask, documents, pattern, everything) if mask.shape[3] == length else Said(everything)


def read_block(mask: Tensor, documents: Tensor | None, pattern: Pattern, everything: Tensor) -> Said:
    """What a shard's own block [B, 1, S/P, S/P] of a mask says: the padding, and whether documents are kept apart.

    A token that is no padding sees itself, so the diagonal is the padding. The block must be what padding, documents
    and the pattern draw: anything else says something of this shard that nobody says of the others.
    """
    seen = mask if mask.dtype == torch.bool else mask == 0
    lowest = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else 0
    is_binary = mask.dtype == torch.bool or (mask.is_floating_point() and bool(((mask < lowest) | seen).all()))
    if is_binary and mask.shape[1] == 1:
        padding = seen[:, 0].diagonal(dim1=1, dim2=2).expand_as(everything)
        length, device = mask.shape[2], mask.device
        drawn = {kind: draw(pattern, length, device, padding, x) for kind, x in ((SEPARATE, documents), (JOINED, None))}
        fitting = [kind for kind, block in drawn.items() if torch.equal(seen.expand_as(block), block)]
        if fitting:
            return Said(padding.long(), fitting[0] if len(fitting) == 1 else UNKNOWN)
    return Said(
        everything,
        problem=f"an attention mask {list(mask.shape)} over this rank's own tokens, which is more than causality, "
        "sliding_window, padding and position_ids, so it does not tell what the other ranks' tokens see. "
        "Expected its rows over all keys, [B, 1, S/P, S]. Pass those, or use transform().",
    )


def check_positions(positions: Tensor, lengths: Runs, *, has_offsets: bool) -> None:
    """Refuse positions that every rank counts from 0 again: what a model makes up where its caller passed none."""
    restarting = torch.cat([torch.arange(length, device=positions.device) for length in lengths])
    if max(lengths) > 1 and not has_offsets and bool((positions == restarting).all()):
        raise InputError(
            f"position_ids start again at 0 on each of {len(lengths)} ranks, as where a caller leaves them out. "
            "Expected this rank's slice of the whole sequence's. Pass position_ids; for documents that do end there, "
            "pass cu_seq_lens_q and cu_seq_lens_k too."
        )


def find_documents(positions: Tensor, said: Tensor) -> Tensor | None:
    """The documents that are to be kept apart, or None: one alone, or some that the shards' masks join.

    transformers looks for documents where it is given no padding mask, and not where it is given one.
    """
    documents, kinds = find_packed_sequence_indices(positions), set(said.unique().tolist())
    if documents is None:
        return None
    if {SEPARATE, JOINED} <= kinds:
        raise InputError(
            "the masks of some ranks keep documents apart, and those of others do not. Expected one kind. "
            "Pass position_ids and no attention_mask for packed documents."
        )
    return None if JOINED in kinds else documents
