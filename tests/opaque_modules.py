"""Modules that no trace can follow for any length, planted into a small model in an MLP's place, or around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from tests.zoo import make_model

WIDTH = 64


class Loop(nn.Module):
    """A recurrence, token by token."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.decay = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = self.decay * state + x[:, t]
            states.append(state)
        output: Tensor = self.inner(torch.stack(states, dim=1))
        return output


class Branching(Loop):
    """Looks at the values, of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.decay if x.amax().item() > 0 else x + self.decay
        output: Tensor = self.inner(scaled)
        return output


class Pair(nn.Module):
    """Tensors by keyword alone, a tuple with None in it, results of one number a token and of one a sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.loop = Loop(inner)

    def forward(
        self, *, x: Tensor, scale: Tensor, gates: tuple[Tensor, None]
    ) -> tuple[Tensor, None, dict[str, Tensor]]:
        flat = x.flatten(0, 1)
        for _ in range(int(x.shape[1]) // 16):
            flat = flat * 1.5
        mixed = self.loop(flat.view_as(x) * gates[0])
        return mixed * scale, None, {"token": mixed.mean(-1), "sequence": mixed.mean(1)}


class AroundPair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.pair = Pair(inner)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mixed, nothing, extra = self.pair(x=x, scale=self.scale, gates=(x.sigmoid(), None))
        assert nothing is None
        output: Tensor = mixed + extra["token"][..., None] + extra["sequence"][:, None] * x
        return output


class Rounding(Function):
    """The gradient of the identity through a step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class StraightThrough(Loop):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(Rounding.apply(x) * self.decay)  # type: ignore[no-untyped-call]
        return output


class Clipping(Function):
    """The identity, whose gradient is cut off: not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(-1, 1)


class Clipped(Loop):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(Clipping.apply(x))  # type: ignore[no-untyped-call]
        return output


class Hooked(Loop):
    """Takes the mean over the tokens out of a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.decay
        if scaled.requires_grad:
            scaled.register_hook(lambda gradient: gradient - gradient.mean(1, keepdim=True))
        output: Tensor = self.inner(scaled)
        return output


class ClippedByHook(Loop):
    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.decay
        if scaled.requires_grad:
            scaled.register_hook(lambda gradient: gradient.clamp(-1, 1))
        output: Tensor = self.inner(scaled)
        return output


class Remembering(Loop):
    """Starts from where the last call ended."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, 0] if self.state is None else self.state[: len(x)] + x[:, 0]
        for t in range(x.shape[1]):
            state = state * 0.5 + x[:, t]
        self.state = state.detach()
        output: Tensor = self.inner(x + state[:, None])
        return output


class Overwriting(Loop):
    """Writes to what it was given: the layer around it does not, and is called whole instead."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        x.zero_()
        return output


class Viewing(Loop):
    """Asks for a view, and thus for tokens that lie in memory as the whole model's do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, WIDTH).view_as(x))


class Halving(Loop):
    """Returns half the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, : x.shape[1] // 2]


class Blocks(Loop):
    """Attends in blocks of 96 tokens, which are padded; each sees the first token of the block before."""

    def forward(self, x: Tensor) -> Tensor:
        batch_size, length, width = x.shape
        padded = F.pad(x, (0, 0, 0, 96 - length % 96))
        num_blocks = padded.shape[1] // 96
        blocks = padded.view(batch_size, num_blocks, 96, width)
        before = blocks.new_zeros((batch_size, num_blocks, width))
        if num_blocks > 1:
            before[:, 1:] = blocks[:, :-1, 0]
        mixed = (blocks @ blocks.transpose(-1, -2) / 8).softmax(-1) @ blocks + before[:, :, None]
        output: Tensor = self.inner(mixed.reshape(batch_size, -1, width)[:, :length])
        return output


class Reading(Loop):
    """Reads what another module of the layer has left in a place that both know."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.place = {"mean": torch.ones(WIDTH)}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.place["mean"]


class Leaving(nn.Module):
    """Leaves the mean of the tokens in that place."""

    def __init__(self, norm: nn.Module, place: dict[str, Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        self.place["mean"] = x.mean((0, 1)).tanh()
        output: Tensor = self.norm(x)
        return output


EXACT: tuple[type[nn.Module], ...] = (
    Loop,
    Branching,
    AroundPair,
    StraightThrough,
    Overwriting,
    Viewing,
    Hooked,
    Blocks,
)
REFUSED: dict[type[nn.Module], str] = {
    Clipped: "not linear",
    ClippedByHook: "not linear",
    Remembering: "keeps state from call to call",
}


def make_opaque(module_class: type[nn.Module], **changes: Any) -> Any:
    """A Llama with such a module around the MLP of its first layer."""
    model = make_model("llama", **changes)
    torch.manual_seed(2)
    layer = model.model.layers[0]
    layer.mlp = module_class(layer.mlp)
    return model


def make_reading() -> Any:
    """The MLP is opaque, and reads what the norm before it leaves."""
    model = make_opaque(Reading)
    layer = model.model.layers[0]
    layer.input_layernorm = Leaving(layer.input_layernorm, layer.mlp.place)
    return model
