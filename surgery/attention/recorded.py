"""What is written down while a model is traced: which functions are to be called, and with what.

RecordedCall     an attention function, its module and its keywords, with a slot for each tensor
RecordedMask     a mask function and its keywords
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask

from surgery.attention.closures import LiftedFunction

DOCUMENT_ENDS = "cu_seq_lens_q"
BLIND_TO_DOCUMENT_ENDS = (sdpa_attention_forward, flex_attention_forward)
"""Attention functions that do not read cu_seq_lens_*, nor does eager attention: they become documents of the mask."""
TENSOR_MASKS = (sdpa_mask, eager_mask, flash_attention_mask)
"""Mask functions that make a tensor of a known shape, so that a model may compute with it."""


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A registered attention function, and what one call of it was given.

    `leaves` are the keywords' values in the order of `spec`, with `Slot`s where tensors and sizes are filled in.
    """

    implementation: str
    function: Callable[..., Any]
    module_path: str
    num_heads: int
    num_kv_heads: int
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @property
    def reads_document_ends(self) -> bool:
        """Whether cu_seq_lens_* reach something that may heed them."""
        return reads_document_ends(self.implementation, self.function)

    @property
    def window(self) -> int | None:
        """The sliding window, where the attention function and not the mask keeps to it: flash-attn's."""
        given = pytree.tree_unflatten(self.leaves, self.spec).get("sliding_window")
        return given if self.function is flash_attention_forward and isinstance(given, int) else None

    def keywords(self, tensors: Any, sizes: Any) -> dict[str, Any]:
        """The keywords of the call, with these tensors and sizes in their places."""
        given = {"tensor": tensors, "size": sizes}
        filled = [given[leaf.kind][leaf.index] if isinstance(leaf, Slot) else leaf for leaf in self.leaves]
        keywords: dict[str, Any] = pytree.tree_unflatten(filled, self.spec)
        return keywords


def reads_document_ends(implementation: str, function: Callable[..., Any] | None) -> bool:
    return implementation != "eager" and function not in BLIND_TO_DOCUMENT_ENDS


@dataclass(frozen=True)
class Slot:
    """The place of the `index`-th tensor, or size, of a call."""

    kind: str
    index: int


@dataclass(frozen=True, eq=False)
class RecordedMask:
    """A registered mask function, and the keywords it was given besides the sizes and the pattern.

    `lifted` is a mask function of the model's own, its tensors taken out.
    """

    implementation: str
    function: Callable[..., Any]
    keywords: dict[str, Any]
    lifted: LiftedFunction | None = None


class FoundDocuments(NamedTuple):
    """Documents [B, S], and the positions [B, S] in which they were found."""

    documents: Tensor
    positions: Tensor


@dataclass
class Recording:
    """What is written down of one trace: calls and masks by number.

    `functions` are the registered attention functions by name, `tensors` the arguments of the model. `documents` are
    those that transformers has found for the mask that it makes next.
    """

    model: nn.Module
    functions: dict[str, Callable[..., Any] | None]
    calls: list[RecordedCall] = field(default_factory=list)
    masks: list[RecordedMask] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    documents: FoundDocuments | None = None

    def start(self, tensors: dict[str, Tensor]) -> None:
        """Write down another run of the forward: what was written of the last one belongs to no graph."""
        self.tensors, self.documents = tensors, None
        self.calls.clear()
        self.masks.clear()
