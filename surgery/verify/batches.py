"""The kinds of input that `surgery verify` tries: what a training loop may pass, small.

plain          token ids and labels [B, S]
uneven         labels of -100: a third of the tokens, and the whole second half of the first sequence
packed         position_ids that start again: two documents in a row
left-padded    attention_mask [B, S] with zeros in front (right-padded: behind)
odd            a length that no number of ranks divides
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

BATCH_SIZE, LENGTH, ODD_LENGTH = 2, 32, 31
IGNORED = -100
FIRST_ID, LAST_ID = 20, 100
Batch = dict[str, Tensor]


def make_batch(kind: str, config: PreTrainedConfig) -> Batch:
    """A batch of `kind` from a fixed seed, without any of the model's special tokens."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = config.get_text_config().vocab_size
    special = set(_special_tokens(config))
    ordinary = [token for token in range(FIRST_ID, min(LAST_ID, vocab_size)) if token not in special]
    length = ODD_LENGTH if kind == "odd" else LENGTH
    chosen = torch.randint(len(ordinary), (BATCH_SIZE, length), generator=generator)
    ids = torch.tensor(ordinary)[chosen]
    return KINDS[kind](ids, generator)


def is_applicable(kind: str, model: nn.Module) -> bool:
    """Whether the model takes the arguments of this kind."""
    parameters = inspect.signature(model.forward).parameters
    return _need(kind) in parameters


def find_families(kinds: Iterable[str]) -> list[list[str]]:
    """The kinds by what they pass besides ids and labels: those of a family share what is captured."""
    return [list(family) for _, family in itertools.groupby(sorted(kinds, key=_need), key=_need)]


def _need(kind: str) -> str:
    return NEEDS.get(kind, "input_ids")


def _uneven(ids: Tensor, generator: torch.Generator) -> Batch:
    ignored = torch.rand(ids.shape, generator=generator) < 0.3
    ignored[0, ids.shape[1] // 2 :] = True
    return {"input_ids": ids, "labels": ids.masked_fill(ignored, IGNORED)}


def _packed(ids: Tensor, generator: torch.Generator) -> Batch:
    first = ids.shape[1] * 3 // 8
    positions = torch.cat([torch.arange(first), torch.arange(ids.shape[1] - first)])
    return {**_uneven(ids, generator), "position_ids": positions.expand(ids.shape[0], -1).contiguous()}


def _padded(ids: Tensor, generator: torch.Generator, *, is_left: bool) -> Batch:
    count = ids.shape[1] // 4
    mask = torch.ones_like(ids)
    mask[0, slice(0, count) if is_left else slice(-count, None)] = 0
    batch = _uneven(ids, generator)
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, IGNORED)}


def _special_tokens(config: PreTrainedConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _special_tokens(value)
        elif name.endswith(("_token_id", "_token_index")):
            yield from value if isinstance(value, (list, tuple)) else [value]


NEEDS = {"packed": "position_ids", "left-padded": "attention_mask", "right-padded": "attention_mask"}
KINDS: dict[str, Callable[[Tensor, torch.Generator], Batch]] = {
    "plain": lambda ids, _: {"input_ids": ids, "labels": ids.clone()},
    "uneven": _uneven,
    "packed": _packed,
    "left-padded": lambda ids, generator: _padded(ids, generator, is_left=True),
    "right-padded": lambda ids, generator: _padded(ids, generator, is_left=False),
    "odd": _uneven,
}
