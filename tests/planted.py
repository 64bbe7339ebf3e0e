"""Operations that mix tokens, planted into a small model: each must come out exact or be refused, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import make_model


def causal_convolution(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), weight[:, None, :3], groups=x.shape[-1]).transpose(1, 2)


def pooled_by_four(x: Tensor, weight: Tensor) -> Tensor:
    pooled = x.view(x.shape[0], x.shape[1] // 4, 4, x.shape[2]).mean(2, keepdim=True)
    return (x.view(x.shape[0], x.shape[1] // 4, 4, x.shape[2]) + pooled).view(x.shape)


def summaries_of_fours(x: Tensor, weight: Tensor) -> Tensor:
    """Attention to all tokens and to the best summaries, of four tokens and the four before; a rest has none.

    A long sequence is weighed otherwise.
    """
    batch_size, length, width = x.shape
    count = length // 4
    fours = x[:, : 4 * count].view(batch_size, count, 4, width)
    windows = fours.new_zeros((batch_size, count, 8, width))
    windows[:, :, 4:] = fours
    if count > 1:
        windows[:, 1:, :4] = fours[:, :-1]
    summaries = windows.mean(2)
    best = (x @ summaries.transpose(1, 2)).topk(min(3, count), dim=-1).indices
    bias = x.new_full((batch_size, length, count), -1e4).scatter(-1, best, 0.0)
    keys = torch.cat([x, summaries], dim=1)
    scores = x @ keys.transpose(1, 2) / 8 + torch.cat([x.new_zeros(batch_size, length, length), bias], dim=-1)
    return x + scores.softmax(-1) @ keys * (2 if length > 40 else 1)


def linear_attention(x: Tensor, weight: Tensor) -> Tensor:
    memory = torch.einsum("bsh,bsk->bhk", x, torch.tanh(x @ weight))
    return torch.einsum("bsh,bhk->bsk", x, memory) / x.shape[1]


def sorted_by_norm(x: Tensor, weight: Tensor) -> Tensor:
    order = x.norm(dim=-1).argsort(dim=1)
    return x.gather(1, order[..., None].expand_as(x))


def hand_written_attention(x: Tensor, weight: Tensor) -> Tensor:
    scores = x @ (x @ weight).transpose(1, 2) / 8
    length = x.shape[1]
    visible = torch.arange(length)[:, None] >= torch.arange(length)[None, :]
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ x


def batch_statistics(x: Tensor, weight: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return ((flat - flat.mean(0)) / (flat.var(0) + 1).sqrt()).view_as(x)


def written_in_place(x: Tensor, weight: Tensor) -> Tensor:
    shifted = x.clone()
    shifted[:, :-1] = x[:, 1:]
    shifted[:, -1] = 0
    return shifted @ weight


def written_constant(x: Tensor, weight: Tensor) -> Tensor:
    scales = torch.tensor([1.0, 2.0])
    scales *= 2
    scales[1] += x.shape[1]
    return x * scales.repeat(x.shape[-1] // 2)


def seen_through_dropout(x: Tensor, weight: Tensor) -> Tensor:
    """Dropout that is off is its operand: what is written to one is read from the other."""
    y = x @ weight
    dropped = F.dropout(y, 0.0, training=True)
    y[:, 1:] += x[:, :-1]
    return x + dropped


def seen_through_einsum(x: Tensor, weight: Tensor) -> Tensor:
    y = x @ weight
    turned = torch.einsum("bsh->bhs", y)
    y[:, 1:] += x[:, :-1]
    return x + turned.transpose(1, 2)


def masked_by_distance(x: Tensor, weight: Tensor) -> Tensor:
    """Attention of 8 heads that share a mask of two dims, [S, S]."""
    query, key = (y.view(x.shape[0], x.shape[1], 8, -1).transpose(1, 2) for y in (x @ weight, x))
    positions = torch.arange(x.shape[1])
    near = (positions[:, None] - positions).abs() < 3
    return x + F.scaled_dot_product_attention(query, key, key, attn_mask=near).transpose(1, 2).flatten(2)


def batch_as_heads(x: Tensor, weight: Tensor) -> Tensor:
    query, key = (y.view(x.shape[0], x.shape[1], 8, -1).permute(2, 0, 1, 3) for y in (x @ weight, x))
    return x + F.scaled_dot_product_attention(query, key, key).permute(1, 2, 0, 3).flatten(2)


PLANTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal_convolution": causal_convolution,
    "roll": lambda x, w: x + x.roll(1, 1) @ w,
    "roll_flat": lambda x, w: x + x.roll(3),
    "cumsum": lambda x, w: x.cumsum(1) / x.shape[1],
    "mean_fed_back": lambda x, w: x + x.mean(1, keepdim=True) @ w,
    "mean_of_all": lambda x, w: x * x.mean(),
    "sum_then_divide": lambda x, w: x + x.sum(1, keepdim=True) / x.size(1),
    "max_over_tokens": lambda x, w: x + x.amax(1, keepdim=True),
    "variance_over_tokens": lambda x, w: x / (x.var(1, keepdim=True) + 1).sqrt(),
    "batch_statistics": batch_statistics,
    "flip": lambda x, w: x + x.flip(1) @ w,
    "shift_by_slice": lambda x, w: F.pad(x[:, :-1], (0, 0, 1, 0)) @ w + x,
    "first_token": lambda x, w: x + x[:, :1] @ w,
    "last_token": lambda x, w: x + x[:, -1][:, None] @ w,
    "every_other_token": lambda x, w: x + x[:, ::2].repeat_interleave(2, dim=1),
    "cat_shifted": lambda x, w: torch.cat([x[:, 1:], x[:, :1]], dim=1) @ w + x,
    "chunk_tokens": lambda x, w: torch.cat(x.chunk(2, dim=1)[::-1], dim=1) + x,
    "pooled_by_four": pooled_by_four,
    "summaries_of_fours": summaries_of_fours,
    "softmax_over_tokens": lambda x, w: x * x.softmax(1),
    "linear_attention": linear_attention,
    "hand_written_attention": hand_written_attention,
    "sorted_by_norm": sorted_by_norm,
    "transposed_matmul": lambda x, w: x + (x.transpose(1, 2) @ x).mean(1, keepdim=True),
    "layer_norm_over_tokens": lambda x, w: F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2),
    "layer_norm_over_both": lambda x, w: F.layer_norm(x, x.shape[1:]),
    "average_pool": lambda x, w: x + F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "max_pool": lambda x, w: x + F.max_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "fft": lambda x, w: x + torch.fft.fft(x, dim=1).real / x.shape[1],
    "complex_numbers": lambda x, w: x + torch.complex(x, x @ w).cumsum(1).abs() / x.shape[1],
    "cummax": lambda x, w: x + x.cummax(1).values,
    "topk_tokens": lambda x, w: x + x.topk(2, dim=1).values.sum(1, keepdim=True),
    "unfold": lambda x, w: x + F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1),
    "difference": lambda x, w: x + torch.diff(x, dim=1, prepend=x[:, :1]),
    "tril_of_scores": lambda x, w: (x @ x.transpose(1, 2)).tril() @ x / x.shape[1],
    "position_dependent": lambda x, w: x * torch.arange(x.shape[1])[None, :, None] / x.shape[1],
    "one_number_per_batch": lambda x, w: x * x.norm(),
    "token_count_scale": lambda x, w: x * x.shape[1],
    "in_place": lambda x, w: (x * 1.0).add_(x.mean(1, keepdim=True)).mul_(2),
    "written_in_place": written_in_place,
    "written_constant": written_constant,
    "seen_through_dropout": seen_through_dropout,
    "seen_through_einsum": seen_through_einsum,
    "scatter_over_tokens": lambda x, w: x + torch.zeros_like(x).scatter(1, (x > 0).long(), x),
    "index_reversed": lambda x, w: x + x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "squeezed": lambda x, w: x + x.squeeze(1) @ w + x[:, :, None].squeeze(),
    "masked_by_distance": masked_by_distance,
    "attention_without_heads": lambda x, w: x + F.scaled_dot_product_attention(x @ w, x, x, is_causal=True),
    "batch_as_heads": batch_as_heads,
    "view_merging_tokens": lambda x, w: x + x.reshape(x.shape[0], -1).cumsum(-1).view(x.shape) / 1000,
    "swapped_batch": lambda x, w: (
        x
        + x.transpose(0, 1)
        .reshape(x.shape[1] * x.shape[0], -1)
        .roll(1, 0)
        .view(x.shape[1], x.shape[0], -1)
        .transpose(0, 1)
    ),
}


class Planted(nn.Module):
    """An MLP whose input has gone through a planted operation."""

    def __init__(self, mlp: nn.Module, operation: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.operation = operation
        self.weight = nn.Parameter(torch.randn(width, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(self.operation(x, self.weight))
        return output


ODD_LENGTHS = [
    "causal_convolution",
    "mean_fed_back",
    "mean_of_all",
    "hand_written_attention",
    "linear_attention",
    "cumsum",
    "complex_numbers",
]
"""Those that the default run proves at a length that P does not divide, which asks for more than one that it does."""


def make_planted(name: str, **changes: Any) -> Any:
    """A Llama whose first layer has the operation `name` before its MLP."""
    return plant(make_model("llama", **changes), PLANTED[name])


def plant(model: Any, operation: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """The Llama `model` with an operation on tokens and a weight before its first MLP."""
    torch.manual_seed(2)
    layer = model.model.layers[0]
    layer.mlp = Planted(layer.mlp, operation, 64)
    return model
