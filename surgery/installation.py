"""Giving a model its transformed forward, and taking it back."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from surgery.model_surgery import ModelSurgery


def install(model: Any, surgery: ModelSurgery) -> None:
    """Give `model` the transformed forward, and `generate` the original one."""
    original = model.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.surgery(args, kwargs)

    model.surgery = surgery
    model.forward = types.MethodType(forward, model)
    if hasattr(model, "generate"):
        model.generate = types.MethodType(_bypassing(type(model).generate), model)


def _bypassing(generate: Any) -> Any:
    @functools.wraps(generate)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.surgery.is_generating = True
        try:
            return generate(self, *args, **kwargs)
        finally:
            self.surgery.is_generating = False

    return run


def uninstall(model: nn.Module) -> None:
    """Take back everything `install` did."""
    for name in ("forward", "generate", "surgery"):
        model.__dict__.pop(name, None)
