"""Functions are taken apart into code and tensors, and put together around others; what may hide one is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import and_masks, causal_mask_function, padding_mask_function

from surgery.attention.closures import UnliftableError, fill, lift


def same(ids: Tensor, shift: int = 0) -> Callable[..., Tensor]:
    def inner(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, more: Tensor = ids[:, :1]) -> Tensor:
        return (ids[batch, query] == ids[batch, key] + shift) & (more[batch, 0] >= 0)

    return inner


def test_tensors_are_replaced() -> None:
    first, second = torch.tensor([[1, 1, 2]]), torch.tensor([[3, 4, 4]])
    found: list[Tensor] = []
    lifted = lift(and_masks(causal_mask_function, same(first), padding_mask_function(first > 0)), found)
    assert len(found) == 3
    function = fill(lifted, [second, second[:, :1], second > 0])
    expected = and_masks(causal_mask_function, same(second), padding_mask_function(second > 0))
    index = torch.arange(3)
    for at in ((torch.tensor(0), torch.tensor(0), q, k) for q in index for k in index):
        assert function(*at) == expected(*at)


def test_what_may_hide_a_tensor_is_refused() -> None:
    hidden = {"ids": torch.ones(1, 3)}
    with pytest.raises(UnliftableError, match="dict"):
        lift(lambda batch, head, query, key: hidden["ids"][batch, query] > 0, [])
