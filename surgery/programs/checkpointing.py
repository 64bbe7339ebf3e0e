"""Gradient checkpointing: a layer's nodes become one function that is run again in the backward.

    x1 = linear(x0); ...; x9 = add(x1, x8)     ->     x9 = layer_0(self, x0)      saves x0, recomputes x1 ... x8

It is honoured where the model asks for it: `model.gradient_checkpointing_enable()` switches it on in the decoder
layers, and those become segments (`segments.py`). Collectives in a layer run again too, in the same order on
every rank.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointed_layers(model: nn.Module) -> tuple[str, ...]:
    """The paths of the layers whose activations the model asks to recompute."""
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and module.training
    )
