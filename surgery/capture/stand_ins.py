"""A model as it was before an engine sharded it, for the time of one trace.

    weight  DTensor [8/4, 16], or empty under ZeRO-3     ->   a stand-in of the whole shape [8, 16], without memory
    hooks   gather, release, time, count                 ->   none: a trace runs the forward alone

A trace reads shapes and dtypes only. The stand-ins' storages are emptied as soon as they are made, and tied parameters
are tied again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.engines import HOOKS, is_engine_function, is_sharded, whole_shape


@contextmanager
def as_unsharded(model: nn.Module) -> Iterator[None]:
    """Take engines' hooks and shards off `model` while the block runs, and every hook off the model itself."""
    made: dict[int, nn.Parameter] = {}
    with ExitStack() as stack:
        if is_engine_function(F.linear):  # ZeRO 3 puts its own there, for every model
            stack.enter_context(mock.patch.object(F, "linear", torch.ops.aten.linear.default))
        for module in model.modules():
            for name in HOOKS:
                hooks = getattr(module, name)
                kept = {} if module is model else {k: h for k, h in hooks.items() if not is_engine_function(h)}
                if len(kept) < len(hooks):
                    stack.enter_context(mock.patch.object(module, name, OrderedDict(kept)))
            if any(tensor is not None and is_sharded(tensor) for tensor in module._parameters.values()):
                whole = {name: _stand_in(tensor, made) for name, tensor in module._parameters.items()}
                stack.enter_context(mock.patch.object(module, "_parameters", whole))
        yield


def _stand_in(tensor: Tensor | None, made: dict[int, nn.Parameter]) -> Tensor | None:
    """A parameter of the whole shape and no memory in the place of a sharded one; others as they are."""
    if tensor is None or not is_sharded(tensor):
        return tensor
    if id(tensor) not in made:
        empty = torch.empty(whole_shape(tensor), dtype=tensor.dtype, device=tensor.device)
        empty.untyped_storage().resize_(0)
        made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return made[id(tensor)]
