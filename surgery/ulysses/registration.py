"""Names whose models are transformed as they are loaded: what `register_with_transformers("org/name", ...)` asks for.

    register("org/name")    ->    AutoModelForCausalLM.from_pretrained("org/name")    ->    transformed
                                  AutoModelForCausalLM.from_pretrained("org/other")   ->    untouched

While a name is registered, `PreTrainedModel.from_pretrained` looks it up behind the original, and does nothing else.
The last name to be forgotten takes that away again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from surgery.errors import ConfigurationError

_registered: dict[str, Registration] = {}
_original: list[Any] = []


@dataclass(frozen=True)
class Registration:
    """What is done to models of one name; `attention` is the implementation they must have been loaded with."""

    attention: str
    transform: Callable[[nn.Module], Any]


def register(name: str | Path, registration: Registration) -> None:
    """Transform models that are loaded by `name` from now on. A second registration replaces the first."""
    if not _original:
        _original.append(PreTrainedModel.__dict__["from_pretrained"])
        _replace(classmethod(_looking_up(_original[0].__func__)))
    _registered[_key(name)] = registration


def forget(name: str | Path) -> None:
    """Leave models alone that are loaded by `name` from now on; those that were are not changed."""
    _registered.pop(_key(name), None)
    if not _registered and _original:
        _replace(_original.pop())


def _replace(method: Any) -> None:
    PreTrainedModel.from_pretrained = method  # type: ignore[method-assign]


def _looking_up(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(cls, pretrained_model_name_or_path, *args, **kwargs)
        registration = _registered.get(_key(pretrained_model_name_or_path))
        if registration is not None:
            check_attention(loaded[0] if isinstance(loaded, tuple) else loaded, registration.attention)
            registration.transform(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    return from_pretrained


def check_attention(model: Any, attention: str) -> None:
    """Refuse a model that looks its attention up by another name than the one that was asked for."""
    found = getattr(model.config, "_attn_implementation", None)
    if found != attention:
        raise ConfigurationError(
            f"expected {type(model).__name__} to run {attention!r}, the registered core_attn_implementation, found "
            f"{found!r}. Load it with attn_implementation={attention!r}, or register {found!r}."
        )


def _key(name: Any) -> str:
    """A directory by its path, however it was spelled; a hub name as it is."""
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
    return os.path.realpath(text) if os.path.isdir(text) else text
