"""What is set otherwise on a model, and on torch, while the model is traced; each is put back afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from surgery.engines import HOOKS

TRACEABLE = {"_experts_implementation": "grouped_mm", "use_cache": False}
WRITTEN = ("problem_type",)


@contextmanager
def traceable_config(model: nn.Module) -> Iterator[None]:
    """Ask for experts without loops over data and for no cache, for the trace, where the configs have a say.

    What a traced forward writes into its config (the kind of labels it was first given) is taken back: the labels of
    an example must not decide for those of a later call.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    previous = [
        (c, name, getattr(c, name)) for c in configs.values() for name in (*TRACEABLE, *WRITTEN) if hasattr(c, name)
    ]
    try:
        for config, name, _ in previous:
            setattr(config, name, TRACEABLE.get(name, getattr(config, name)))
        yield
    finally:
        for config, name, value in previous:
            setattr(config, name, value)


@contextmanager
def without_saving() -> Iterator[None]:
    """Keep the caller's saved-tensor hooks (offloading, counting) away from what the trace saves: it has no memory."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


@contextmanager
def inference_as_no_grad() -> Iterator[None]:
    """Trace `inference_mode` blocks as `no_grad` blocks: torch.export (2.11 to 2.13) overlooks the former.

    What they compute would have a gradient in the graph.
    """

    def enter(self: torch.inference_mode) -> None:
        self._grad_mode = torch.set_grad_enabled(not self.mode)  # type: ignore[attr-defined]

    def leave(self: torch.inference_mode, *error: object) -> None:
        self._grad_mode.__exit__(*error)  # type: ignore[attr-defined]

    with mock.patch.multiple(torch.inference_mode, __enter__=enter, __exit__=leave):
        yield


@contextmanager
def without_new_attributes(model: nn.Module) -> Iterator[None]:
    """Take back attributes, buffers and hooks that the trace leaves on modules: the model's own code would find them.

    Attributes and buffers would hold its tensors. transformers installs the hooks that record outputs in the first
    forward, and notes that in an attribute: without it, they would be installed, and record, once more.
    torch.export takes back what was assigned to attributes that there were (2.11 to 2.13).
    """
    known = [(names, set(names)) for module in model.modules() for names in _named_things(module)]
    try:
        yield
    finally:
        for names, before in known:
            for name in names.keys() - before:
                del names[name]


def _named_things(module: nn.Module) -> list[dict[Any, Any]]:
    return [vars(module), module._buffers, *(getattr(module, name) for name in HOOKS)]


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Trace layers as they are; `surgery/programs/checkpointing.py` cuts them out of the finished graph."""
    switched_on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in switched_on:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in switched_on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def refused_assignments() -> Iterator[None]:
    """Make an error of torch.export's warning that tensors were assigned to attributes, which it takes back.

    Where a module is called live, it may read what another, which is only in the graph, no longer writes.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"(?s).*assigned during export", category=UserWarning)
        yield
