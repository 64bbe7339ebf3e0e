"""Giving a model its transformed forward, and taking it back."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

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
    if surgery.options.inputs == "sharded" and hasattr(type(model), "loss_function"):
        model.loss_function = _of_a_slice(model)


def _bypassing(generate: Any) -> Any:
    @functools.wraps(generate)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.surgery.is_generating = True
        try:
            return generate(self, *args, **kwargs)
        finally:
            self.surgery.is_generating = False

    return run


def _of_a_slice(model: Any) -> Any:
    """The model's loss function, which a loop calls on a slice's logits: 0, not 0/0, where all its labels are ignored.

    A mean over the ranks weighted by their labels, as loops take it, then counts such a slice for nothing.
    """
    original, replaced = model.loss_function, model.__dict__.get("_loss_function")

    @functools.wraps(original)
    def loss_function(logits: Tensor, labels: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        loss = original(logits, labels, *args, **kwargs)
        if torch.compiler.is_exporting():
            return loss  # a graph sees the whole labels, and divides by their count
        given = kwargs.get("shift_labels") if kwargs.get("shift_labels") is not None else labels
        has_labels = given is None or (given != kwargs.get("ignore_index", -100)).any()
        return loss if has_labels is True else torch.where(has_labels, loss, logits.sum() * 0)

    loss_function.replaced = replaced  # type: ignore[attr-defined]
    return loss_function


def uninstall(model: nn.Module) -> None:
    """Take back everything `install` did."""
    given = model.__dict__.pop("_loss_function", None)
    previous = getattr(given, "replaced", given)
    if previous is not None:
        model.__dict__["_loss_function"] = previous
    for name in ("forward", "generate", "surgery"):
        model.__dict__.pop(name, None)
