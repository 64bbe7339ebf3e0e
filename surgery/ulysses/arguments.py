"""What an attention function is told besides queries, keys and values, made whole: positions, masks, sinks.

    positions [B, S/P]          gathered once a step                        -> [B, S]; resets tell documents apart
    padding   [B, S/P]          gathered with them                          -> [B, S]
    mask      [B, 1, S/P, S/P]  a shard's own block: what it says of padding is read off, checked, gathered, drawn whole
    mask      [B, 1, S/P, S]    rows of this rank's tokens over all keys    -> [B, 1, S, S]
    sinks     [N]               those of this rank's heads                  -> [N/P]

A function that names `sliding_window` among its parameters, as transformers' flash attention does, reads windows,
positions and padding itself. Any other is given a mask wherever a pattern is more than causal. Nothing is dropped: what
cannot be made whole is refused.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.axis import Axis
from surgery.errors import InputError
from surgery.exchange.own_heads import cut_run
from surgery.inputs.sharded_inputs import assemble
from surgery.inputs.signature import BoundCall
from surgery.ulysses.slices import SEPARATE, Pattern, check_positions, draw, find_documents, read_slices

SINKS = ("s_aux", "sinks")
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")
REMEMBERED = 4
NO_MASK = (
    "position_ids hold several documents, and the model drew no mask to keep them apart, as it does where it is given "
    "an attention_mask. Expected position_ids alone for packed documents. Leave the attention_mask out."
)


@dataclass
class Facts:
    """One step's positions and padding, whole; `documents` numbers them where positions start again.

    `rows` is a mask of which every rank passed its tokens' rows; `mask` remembers what was drawn.
    """

    length: int
    positions: Tensor | None
    padding: Tensor | None
    documents: Tensor | None
    rows: Tensor | None
    mask: Tensor | None = None


class WholeArguments:
    """Makes the arguments of `attn` whole; what all layers share is gathered for the first of them and remembered.

    A step begins where the module that called first calls again, or with other tensors: on all ranks alike.
    """

    def __init__(self, attn: Callable[..., Any], axis: Axis, num_heads: int) -> None:
        self.axis = axis
        self.num_heads = num_heads
        self.reads_descriptions = "sliding_window" in inspect.signature(attn).parameters
        self._first: Callable[[], nn.Module | None] = lambda: None
        self._step: list[tuple[tuple[Any, ...], tuple[Any, ...], Facts]] = []

    def __call__(
        self, module: nn.Module, query: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any], int]:
        """The mask and the keywords for `attn` on whole sequences and this rank's heads, and the whole length."""
        is_causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        pattern = Pattern(causal, kwargs.get("sliding_window"))
        check_kwargs(module, mask, kwargs)
        facts = self._facts(module, query, mask, kwargs, pattern)
        whole = self._keywords(kwargs, facts, query)
        if facts.rows is not None:
            return self._own_heads(facts.rows), whole, facts.length
        own_mask = facts.padding if self.reads_descriptions else _mask(query, mask, facts, pattern)
        return own_mask, whole, facts.length

    def _facts(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any], pattern: Pattern
    ) -> Facts:
        """From memory, where an earlier layer of this step was told the same, or gathered now."""
        if self._first() is None:
            self._first = weakref.ref(module)
        if module is self._first():
            self._step.clear()
        tensors = (mask, kwargs.get("position_ids"))
        key = (*(None if x is None else x._version for x in tensors), query.shape[0], query.shape[2], pattern)
        for held, known, facts in self._step:
            if known == key and all(a is b for a, b in zip(held, tensors, strict=True)):
                return facts
        facts = self._gather(module, query, *tensors, pattern, has_offsets=OFFSETS[0] in kwargs)
        self._step = [*self._step[1 - REMEMBERED :], (tensors, key, facts)]
        return facts

    def _gather(
        self,
        module: nn.Module,
        query: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        pattern: Pattern,
        *,
        has_offsets: bool,
    ) -> Facts:
        batch_size, length = query.shape[0], query.shape[2]
        positions = None if positions is None else positions.expand(batch_size, -1)
        said, rows = read_slices(mask, positions, pattern, query), None
        if mask is None and said.documents == SEPARATE and is_of_transformers(module) and not self.reads_descriptions:
            said = said._replace(problem=NO_MASK)
        given = {"padding": said.padding, "documents": said.padding.new_full((length,), said.documents)}
        if positions is not None:
            given["position_ids"] = positions
        if mask is not None and mask.ndim == 4 and mask.shape[3] != length:
            given["attention_mask"] = mask
        call, slices = assemble(BoundCall(given, {}, batch_size, {"s": length}), self.axis, said.problem)
        if not slices.is_even:
            even = ", ".join(map(str, slices.even_lengths))
            raise InputError(
                f"expected slices of {even} tokens, found {', '.join(map(str, slices.lengths))} on the ranks. "
                "Cut sequences evenly, or use transform(inputs='sharded'), which takes any."
            )
        positions, rows, padding = (call.tensors.get(name) for name in ("position_ids", "attention_mask", "padding"))
        assert padding is not None
        documents = None
        if positions is not None:
            check_positions(positions, slices.lengths, has_offsets=has_offsets)
            documents = find_documents(positions, call.tensors["documents"])
        return Facts(call.length, positions, None if bool(padding.all()) else padding, documents, rows)

    def _keywords(self, kwargs: dict[str, Any], facts: Facts, query: Tensor) -> dict[str, Any]:
        whole = dict(kwargs)
        if facts.positions is not None:
            whole["position_ids"] = facts.positions
        for name in SINKS:
            if isinstance(whole.get(name), Tensor):
                own = self.num_heads // self.axis.size
                whole[name] = cut_run(whole[name], 0, self.axis.rank * own, own)
        for name in OFFSETS:
            total = query.shape[0] * facts.length
            if whole.get(name) is not None and int(whole[name][-1]) != total:
                raise InputError(
                    f"expected {name} of the whole sequences, ending at {total}, found {int(whole[name][-1])}. "
                    "Pass the offsets that the unsharded call would get."
                )
        return whole

    def _own_heads(self, mask: Tensor) -> Tensor:
        """A mask for each head cut to this rank's; one that heads share as it is."""
        own = self.num_heads // self.axis.size
        return cut_run(mask, 1, self.axis.rank * own, own)


def _mask(query: Tensor, mask: Tensor | None, facts: Facts, pattern: Pattern) -> Tensor | None:
    """The mask for a function that reads nothing else; None where it need not be told more than `is_causal`."""
    has_window = pattern.window is not None and pattern.window < facts.length
    is_plain = facts.padding is None and facts.documents is None and not has_window
    is_additive = mask is not None and mask.is_floating_point()
    if is_plain and not is_additive:
        return None
    if facts.mask is None:
        drawn = draw(pattern, facts.length, query.device, facts.padding, facts.documents)
        lowest = torch.finfo(query.dtype).min
        facts.mask = torch.where(drawn, torch.zeros((), dtype=query.dtype), lowest) if is_additive else drawn
    return facts.mask


def is_of_transformers(module: Any) -> bool:
    return type(module).__module__.startswith("transformers.")


def check_kwargs(module: Any, mask: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what would be wrong on whole sequences, or dropped."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim not in (2, 4)):
        raise InputError(
            f"expected a mask [B, S/P], [B, 1, S/P, S/P] or [B, 1, S/P, S], found {type(mask).__name__}"
            f"{list(mask.shape) if isinstance(mask, Tensor) else ''}. Use transform() for block masks."
        )
    if kwargs.get("output_attentions"):
        raise InputError("output_attentions=True: a rank has the weights of its own heads only. Expected it off.")
    known = {"position_ids", *SINKS, *OFFSETS}
    strange = sorted(n for n, x in kwargs.items() if isinstance(x, Tensor) and x.ndim > 0 and n not in known)
    if strange:
        raise InputError(
            f"{', '.join(strange)}: expected no tensors but {', '.join(sorted(known))}, as whether they follow heads "
            "or tokens is not known here. Use transform(), which reads it off the model."
        )
    if kwargs.get("position_ids") is None and is_of_transformers(module):
        raise InputError(
            f"{type(module).__name__} does not pass position_ids to its attention, so it cannot be seen whether every "
            "rank counts from 0. Expected position_ids. Pass them to the model, or use transform()."
        )
