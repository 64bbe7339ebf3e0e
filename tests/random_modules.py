"""Modules that draw random numbers, and models whose logits show what was drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.opaque_modules import WIDTH, Loop
from tests.zoo import make_model

SLOT = 8
"""The features of `WIDTH` that each kind of draw fills."""
NUM_HEADS, HEAD_SIZE = 4, 16
PLACES = NUM_HEADS * HEAD_SIZE

OVER_TOKENS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "dropout": (lambda x: F.dropout(x + 1, 0.25), 1.0, 1 / 3),
    "rand_like": (torch.rand_like, 0.5, 1 / 12),
    "uniform": (lambda x: x.clone().uniform_(0.0, 1.0), 0.5, 1 / 12),
    "bernoulli": (lambda x: torch.bernoulli(x + 0.25), 0.25, 3 / 16),
    "randn_like": (torch.randn_like, 0.0, 1.0),
    "randn": (lambda x: torch.randn(x.shape), 0.0, 1.0),
    "exponential": (lambda x: torch.empty_like(x).exponential_(), 1.0, 1.0),
    "gumbel": (lambda x: F.gumbel_softmax(x, dim=-1, hard=True) @ torch.eye(SLOT), 1 / SLOT, 7 / 64),
}
"""For each feature of each token: what is drawn, its mean, its variance."""


class OverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        zeros = x.unflatten(-1, (-1, SLOT)) * 0
        drawn = [draw(zeros[..., i, :]) for i, (draw, _, _) in enumerate(OVER_TOKENS.values())]
        return torch.cat(drawn, dim=-1)


class ForAllTokens(nn.Module):
    """The same for all tokens: features, whole sequences that are dropped, and what was gathered as it mixes tokens."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = [
            torch.rand(2 * SLOT),
            torch.empty(SLOT).normal_(),
            F.dropout(torch.ones(2 * SLOT), 0.5),
            torch.randperm(SLOT) / SLOT,
            torch.multinomial(torch.ones(2 * SLOT), SLOT).float(),
            torch.bernoulli(torch.full((SLOT,), 0.5)),
        ]
        depths = torch.empty(x.shape[0], 1, 1).bernoulli_(0.5)
        mixed = torch.normal(torch.ones_like(x).cumsum(1), 0.5)[:, -1:]
        return x * 0 + torch.cat(drawn) + depths + mixed


class OpaqueNoise(nn.Module):
    """In a module that no trace can follow, as it loops over tokens; it branches on a draw, too."""

    def forward(self, x: Tensor) -> Tensor:
        total = sum(x[:, t] for t in range(x.shape[1]))
        noise = torch.rand(WIDTH) if torch.rand([]) < 0.5 else -torch.rand(WIDTH)
        return (x + torch.as_tensor(total)[:, None]) * 0 + noise


class OpaqueDropout(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.3, self.training)


class Noisy(Loop):
    """Every kind of draw that a trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        jittered = x * torch.empty_like(x).uniform_(0.9, 1.1) + torch.randn(WIDTH) * self.decay
        output: Tensor = F.dropout(self.inner(F.dropout(jittered, 0.2, self.training)), 0.3, self.training)
        return output


class SkippedByPython(Loop):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x) if random.random() < 0.5 else x
        return output


class WithGenerator(Loop):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x + torch.randn(WIDTH, generator=self.generator))
        return output


def make_shown(module: nn.Module) -> Any:
    """A Llama whose logits are what `module` puts in the place of its last norm."""
    model = make_model("llama", vocab_size=WIDTH)
    model.model.norm = module
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(WIDTH))
    return model


def make_attending(dropout: float) -> Any:
    """A Llama of two layers that attend evenly, whose logits show which keys were kept.

    Its batches are the ids 0 to 15, each of which is one feature. Layer l adds, for head h and key k, its share of k to
    feature `PLACES * (1 + l) + HEAD_SIZE * h + k`.
    """
    width = 3 * PLACES
    model = make_model(
        "llama",
        vocab_size=width,
        hidden_size=width,
        head_dim=HEAD_SIZE,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        num_hidden_layers=2,
        attention_dropout=dropout,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(width))
        model.lm_head.weight.copy_(torch.eye(width))
        for index, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight.fill_(1.0)
            layer.self_attn.v_proj.weight[:, :HEAD_SIZE] = torch.eye(HEAD_SIZE).repeat(NUM_HEADS, 1)
            layer.self_attn.o_proj.weight[PLACES * (1 + index) :][:PLACES] = torch.eye(PLACES)
    model.model.norm = nn.Identity()
    return model


def kept_keys(logits: Tensor) -> Tensor:
    """Which keys were kept, of those a query may see: [layers, heads, pairs of query and key in all sequences]."""
    shares = logits[..., PLACES:].unflatten(-1, (2, NUM_HEADS, HEAD_SIZE))
    seen = torch.ones(HEAD_SIZE, HEAD_SIZE, dtype=torch.bool).tril()
    return (shares.permute(2, 3, 0, 1, 4)[..., seen] != 0).flatten(2)
