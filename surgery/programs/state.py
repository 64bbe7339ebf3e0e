"""What a captured graph takes for granted about a model, checked before every call: nothing is silently dropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery.capture.recording import attention_implementations
from surgery.engines import hooks_of, is_engine_function, is_mark, original_class, whole_shape
from surgery.errors import CaptureError
from surgery.programs.checkpointing import checkpointed_layers

INSTALLED = ("forward", "generate")  # what the transform itself puts on the model
CHECKPOINTING = (  # a matter of segments, not of the graph
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hooks",
)
RECORDERS = "_output_capturing_hooks_installed"  # says that there are hooks, which record nothing here

OF_TORCH = frozenset(vars(nn.Module()))
PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, type(None))


def fingerprint(model: nn.Module) -> int:
    """A hash of the module tree and its attention functions: classes, modes, each parameter's shape, dtype and ties.

    Two equal fingerprints mean that a graph captured at one still describes the model at the other; the parameters'
    values and identities do not enter, as the graph looks them up.
    """
    first_name: dict[int, str] = {}
    entries: list[object] = []
    for path, module in model.named_modules():
        entries.append((path, original_class(module)))
        entries.append((path, *_settings(module, INSTALLED if module is model else ())))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tied_to = first_name.setdefault(id(tensor), f"{path}.{name}")
                entries.append((name, whole_shape(tensor), tensor.dtype, tensor.device, tied_to))
    entries += _settings(model.config) if hasattr(model, "config") else []
    for name in sorted(attention_implementations(model)):
        entries.append((name, id(ALL_ATTENTION_FUNCTIONS.get(name)), id(ALL_MASK_ATTENTION_FUNCTIONS.get(name))))
    return hash(tuple(entries))


def _settings(owner: object, skipped: tuple[str, ...] = ()) -> list[object]:
    """What a trace bakes in of a module or a config: plain values, functions, tensors, and lists of plain values."""
    found: list[object] = []
    for name, value in vars(owner).items():
        if name in CHECKPOINTING or name == RECORDERS or is_mark(name):
            continue
        if isinstance(value, PLAIN):
            found.append((name, value))
        elif isinstance(value, Tensor):
            found.append((name, id(value), value._version))
        elif isinstance(value, dict | list | tuple | set) and name not in OF_TORCH and _is_plain(value):
            found.append((name, repr(value)))
        elif isinstance(value, PreTrainedConfig) and isinstance(owner, PreTrainedConfig):
            found += _settings(value)
        elif isinstance(value, FunctionType | MethodType | partial):
            function = getattr(value, "replaced", value)  # by what the transform itself put there
            is_engine = is_engine_function(getattr(value, "func", value))
            if not (name in skipped or is_engine or function is None):
                found.append((name, *_function(function)))
    return found


def _function(function: Callable[..., Any]) -> tuple[object, ...]:
    """Whose code a function runs, and the plain values that are bound to it."""
    if isinstance(function, partial):
        return *_function(function.func), _plain((*function.args, *function.keywords.items()))
    code = getattr(function, "__code__", function)
    cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != CellType())
    return id(code), _plain((*cells, *(getattr(function, "__defaults__", None) or ())))


def _plain(values: tuple[object, ...]) -> str:
    return repr([value for value in values if _is_plain(value)])


def _is_plain(value: object) -> bool:
    """Whether a container holds nothing but numbers, words, dtypes and containers of them."""
    if isinstance(value, dict):
        return all(_is_plain(x) for pair in value.items() for x in pair)
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def check_state(model: nn.Module) -> None:
    """Refuse what a graph of the whole model would drop. Raises `CaptureError`, naming the module."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise CaptureError(
            "the model is quantized, and its weights would be read as if they were not. "
            "Expected plain floating weights. Load it without a quantization config."
        )
    config = getattr(model, "config", None)
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise CaptureError(f"config.{name} is set, and the captured graph keeps no such outputs. Set it to False.")
    _check_checkpointing(model)
    for path, module in model.named_modules():
        _check_module(path or type(model).__name__, module, is_root=module is model)


def _check_checkpointing(model: nn.Module) -> None:
    is_asked = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if model.training and is_asked and not checkpointed_layers(model):
        raise CaptureError(
            f"gradient checkpointing is switched on in {type(model).__name__}, but none of its layers can be "
            "checkpointed alone. Expected layers derived from transformers' GradientCheckpointingLayer. "
            "Call model.gradient_checkpointing_disable()."
        )


def _check_module(path: str, module: nn.Module, *, is_root: bool) -> None:
    foreign = [hook for hook in hooks_of(module) if not is_engine_function(hook)]
    if foreign and not is_root:
        raise CaptureError(
            f"a hook ({getattr(foreign[0], '__qualname__', foreign[0])}) is registered on {path}, and one graph of the "
            "whole model would not call it. Expected no hooks on submodules but those of FSDP2 and DeepSpeed, which "
            "change no activation. Remove it, or hook the model itself."
        )
    if hasattr(module, "_hf_hook"):
        raise CaptureError(
            f"the weights of {path} are offloaded (accelerate hooks), and the graph would read placeholders. "
            "Expected all weights on the device. Load the model without a device_map."
        )
