"""What belongs to heads is cut to a rank's; what may belong to them and cannot be told is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from surgery.errors import CaptureError
from surgery.exchange.own_heads import HeadView, OwnHeads
from surgery.private import flex_heads_from

HEADS = OwnHeads(first=4, count=2, kv_count=1, total=8, total_kv=2)
WHOLE = OwnHeads(first=0, count=8, kv_count=2, total=8, total_kv=2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.num_key_value_groups = 8, 2, 4
        self.head_dim = 16
        self.sinks = nn.Parameter(torch.arange(8.0))
        self.scale = nn.Parameter(torch.ones(16))
        self.table = nn.Parameter(torch.ones(3, 8))


def test_a_view_has_the_heads_of_its_rank() -> None:
    module = Attention()
    view = HeadView(module, HEADS)
    assert (view.num_heads, view.num_key_value_heads, view.num_key_value_groups, view.head_dim) == (2, 1, 2, 16)
    assert torch.equal(view.sinks, torch.tensor([4.0, 5.0]))
    assert view.scale is module.scale
    assert not hasattr(view, "no_such_name")


def test_a_view_of_all_heads_is_the_module() -> None:
    module = Attention()
    view = HeadView(module, WHOLE)
    assert (view.num_heads, view.num_key_value_groups) == (8, 4)
    assert view.sinks is module.sinks
    assert view.table is module.table


def test_a_gradient_reaches_the_heads_of_the_rank() -> None:
    module = Attention()
    HeadView(module, HEADS).sinks.sum().backward()
    assert module.sinks.grad is not None
    assert torch.equal(module.sinks.grad, torch.tensor([0.0] * 4 + [1.0] * 2 + [0.0] * 2))


def test_what_may_belong_to_heads_is_refused() -> None:
    view = HeadView(Attention(), HEADS)
    with pytest.raises(CaptureError, match=r"reads table of its module, of shape \(3, 8\).*8 heads.*Expected"):
        _ = view.table


def test_masks_and_keywords_are_cut() -> None:
    mask = torch.rand(2, 8, 6, 6)
    shared, padding = mask[:, :1], torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(HEADS.cut_mask(mask), mask[:, 4:6])
    assert HEADS.cut_mask(shared) is shared
    assert HEADS.cut_mask(padding) is padding
    assert HEADS.cut_mask(None) is None
    cut = HEADS.cut_keywords({"s_aux": torch.arange(8), "scaling": 0.5, "position_bias": mask})
    assert torch.equal(cut["s_aux"], torch.tensor([4, 5]))
    assert cut["scaling"] == 0.5
    assert torch.equal(cut["position_bias"], mask[:, 4:6])


def test_flex_sees_the_heads_of_the_model() -> None:
    """A score and a mask that go by the head, in blocks for each head: a rank's part of what the whole gives."""
    q, k, v = torch.rand(3, 1, 8, 256, 16)

    def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return value - 0.1 * head * (query - key)

    mask = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < 16 * (h + 1)), 1, 8, 256, 256, device="cpu")
    with torch.compiler.set_stance("force_eager"):
        whole = flex_attention(q, k, v, score, mask)
        with flex_heads_from(HEADS.first, are_scores_own=False):
            own = flex_attention(q[:, 4:6], k[:, 4:6], v[:, 4:6], score, HEADS.cut_mask(mask))
        again = flex_attention(q, k, v, score, mask)
    assert torch.allclose(own, whole[:, 4:6], atol=1e-6)
    assert torch.equal(again, whole)
