"""What others put on a model, and how to see through it: FSDP2's `fully_shard`, DeepSpeed's ZeRO, torch.compile.

    a hook on a layer           gathers the layer's parameters before its forward, and releases them behind it
    a parameter                 a DTensor, or empty, where it is sharded: the whole shape is still written on it
    a class of its own          FSDPLlamaDecoderLayer is a LlamaDecoderLayer
    attributes of modules       counters and marks, which change from step to step

None of it changes what the model computes, so none of it enters a signature; the hooks are honoured by
`surgery/programs/segments.py`. Nothing here imports an engine: what it left behind is recognised by name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from surgery.private import is_idle_hook

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SHARDING_MODULES = ("deepspeed.runtime.zero.", "deepspeed.utils.nvtx", "torch.distributed.fsdp._fully_shard.")
# Who asks the mpu. DeepSpeed averages gradients over data-parallel ranks and adds them up over sequence-parallel ones,
# in stages 0 to 2 and in one of the two ways through stage 3; stage 3 shards over one group and reduces over another.
# Told that all ranks are data-parallel, it averages over all of them in every stage, as gradients="mean" promises.
DEEPSPEED_SCALES = "deepspeed.utils.groups"
DEEPSPEED_SHARDS = "deepspeed.runtime.zero.parameter_offload"
MARKS = (
    "ds_",
    "_ds_",
    "_z3_",
    "_external_params",
    "_original_parameters",
    "applied_pre_backward_",
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
    "_is_full_backward_hook",
    "_is_torch_compile",  # what torch.compile(model) leaves there, and model.compile()
    "_compiled_call_impl",
)


def is_engine_function(function: Callable[..., Any]) -> bool:
    """Whether a hook is an engine's, which gathers and releases parameters and changes no activation."""
    return (getattr(function, "__module__", None) or "").startswith(SHARDING_MODULES)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks around a module's call that do something."""
    return [hook for name in HOOKS for hook in getattr(module, name).values() if not is_idle_hook(hook)]


def hooked_modules(model: nn.Module) -> tuple[str, ...]:
    """The paths of the submodules that carry hooks."""
    return tuple(path for path, module in model.named_modules() if module is not model and hooks_of(module))


def is_mark(name: str) -> bool:
    """Whether a module's attribute is an engine's, or torch.compile's."""
    return name.startswith(MARKS)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before `fully_shard` gave it one of its own."""
    ancestors = type(module).__mro__
    return ancestors[ancestors.index(FSDPModule) + 1] if FSDPModule in ancestors else ancestors[0]


def is_sharded(tensor: Tensor) -> bool:
    """Whether an engine has left this rank only a part of a parameter."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_shape")


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a parameter before it was sharded; a DTensor's own shape is that already."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def is_asked_by(module_name: str) -> bool:
    """Whether the caller of the function that asks this is code of the module `module_name`, for its own package.

    A user's script may ask DeepSpeed's record of groups too, and is to have the true answer.
    """
    caller = sys._getframe(2)
    asker = caller.f_back.f_globals.get("__name__", "") if caller.f_back is not None else ""
    is_for_package = asker.partition(".")[0] == module_name.partition(".")[0]
    return caller.f_globals.get("__name__") == module_name and is_for_package


def deepspeed_engine(model: nn.Module) -> Any | None:
    """The DeepSpeed engine that drives `model`, found by the hook it has put on the model; None without one."""
    for hook in model._forward_pre_hooks.values():
        if getattr(hook, "__module__", None) == "deepspeed.runtime.engine":
            return inspect.getclosurevars(hook).nonlocals.get("self")
    return None
