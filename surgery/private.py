"""Most of what torch and transformers do not call public, so that a change there is felt in one place.

`tests/test_private.py` fails when one of these moves. `torch.distributed._functional_collectives` is underscored, but
it is what torch documents for traceable collectives; transformers' exporter patches are what its own exporters are
made of.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.exc import (
    UserError as UserError,
)  # what torch.export raises for dims that are less dynamic than asked for
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed import _functional_collectives as functional
from torch.distributed.distributed_c10d import GroupName as GroupName
from torch.distributed.fsdp import FSDPModule
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode as GuardOnDataDependentSymNode
from torch.nn.attention import flex_attention as flex_attention_module
from transformers.exporters import exporter_dynamo  # noqa: F401  (fills the table of patches)
from transformers.exporters.utils import apply_patches
from transformers.modeling_utils import AttentionInterface

FLEX: Any = flex_attention_module
IS_TRACED = "is_torchdynamo_compiling"


def all_to_all_runs(x: Tensor, sent: Sequence[int], received: Sequence[int], group_name: GroupName) -> Tensor:
    """Send a run of dim 0 to each rank: `sent[p]` elements to rank p, `received[p]` from it. Differentiable.

    Complex numbers travel as pairs of real ones, as torch has the other collectives do. torch 2.11 does not copy what
    does not fill memory in order before it sends; to be deleted when no supported version leaves that to us.
    """
    if x.is_complex():
        return torch.view_as_complex(all_to_all_runs(torch.view_as_real(x), sent, received, group_name))
    return _arrived(functional.all_to_all_single_autograd(x.contiguous(), list(received), list(sent), group_name))


def all_gather_first_dim(x: Tensor, size: int, group_name: GroupName) -> Tensor:
    """Concatenate the ranks' tensors in dim 0. Differentiable: the backward is a reduce-scatter."""
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group_name)
    return functional.wait_tensor(gathered)


def all_reduce_sum(x: Tensor, group_name: GroupName) -> Tensor:
    """The sum over the ranks. Differentiable: the backward is an all-reduce."""
    return _arrived(functional.all_reduce(x, "sum", group_name))


def _arrived(x: Tensor) -> Tensor:
    """A plain tensor: eager collectives return one that waits on its first use, traced ones have waited already."""
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x


@contextmanager
def calls_replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let `function` stand for every call of `module`, and of its hooks, while the block runs."""
    with mock.patch.object(module, "_compiled_call_impl", function):
        yield


@contextmanager
def export_patches() -> Iterator[None]:
    """transformers' replacements for model code that does not export, for the time of one trace."""
    with apply_patches("dynamo"):
        yield


@contextmanager
def without_fake_tensor_cache() -> Iterator[None]:
    """Fake tensors that are computed each time: torch's cache of them takes long to fill where sizes are symbols.

    A llama of one layer is captured in 1.3 s instead of 1.9 s. One of 16 equal layers reads it more often than it
    fills it, and is captured in 10.9 s instead of 10.2 s.
    """
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@contextmanager
def intercepted_lookup(
    replace: Callable[[str, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Let `replace(name, function)` decide what models get that look up an attention function, eager ones included.

    A model's eager attention is in no registry: it is the default that the model looks up with.
    """
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return replace(name, original(self, name, default))

    with mock.patch.object(AttentionInterface, "get_interface", get_interface):
        yield


@contextmanager
def flex_heads_from(first: int, *, are_scores_own: bool) -> Iterator[None]:
    """Let flex attention call its modifications with head indices that count from `first`.

    `score_mod(score, batch, head, query, key)` and `mask_mod` are written for all heads of a model; a rank has those
    from `first` on. `are_scores_own`: the score_mod reads what was cut to the rank's heads, and counts from 0.
    """
    original = FLEX.flex_attention_hop

    def shifted(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any,
        block_mask: tuple[Any, ...],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        *blocks, mask_mod = block_mask

        def own_scores(score: Tensor, batch: Tensor, head: Tensor, *places: Tensor) -> Any:
            return score_mod(score, batch, head + first, *places)

        def own_mask(batch: Tensor, head: Tensor, *places: Tensor) -> Any:
            return mask_mod(batch, head + first, *places)

        scores = score_mod if are_scores_own else own_scores
        return original(query, key, value, scores, (*blocks, own_mask), *args, **kwargs)

    FLEX.flex_attention_hop = shifted
    try:
        yield
    finally:
        FLEX.flex_attention_hop = original


@contextmanager
def refused_specialization(error: type[Exception]) -> Iterator[None]:
    """While a model is traced, raise `error` where its code needs a symbolic size as a plain number.

    Export would go on with the example's number, and report at the end that the size is not dynamic, without a place.
    """
    original = SymNode.guard_int

    def guard_int(self: SymNode, file: str, line: int) -> int:
        is_fixed = self.shape_env is None or self.shape_env._maybe_evaluate_static(self.expr) is not None
        if not is_fixed and self.has_hint():
            raise error()
        return original(self, file, line)

    with mock.patch.object(SymNode, "guard_int", guard_int):
        yield


@contextmanager
def told_eager(model: nn.Module) -> Iterator[None]:
    """Let the code of a model that is traced believe that it is not: what it does then may be all that works.

    Model files import transformers' question by name, so each has a copy to replace.
    """
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    with ExitStack() as stack:
        for file in files:
            if hasattr(file, IS_TRACED):
                stack.enter_context(mock.patch.object(file, IS_TRACED, return_value=False))
        yield


def functionalized(program: ExportedProgram) -> ExportedProgram:
    """The same program without in-place operations, none decomposed but `copy`, which `x[:, 1:] = y` leaves behind.

    torch 2.11 to 2.13 copy a deprecated tree spec on the way and warn of it; to be deleted when they no longer do.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return program.run_decompositions({torch.ops.aten.copy.default: _copy})


def _copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What `aten.copy` gives, in operations that have a derivative: it has none itself in torch 2.11 to 2.13."""
    return source.to(destination).expand_as(destination)


def root_of(dim: Dim) -> Dim:
    """The dim that a multiple is of: `k` for `4 * Dim("k") + 1`, and `dim` itself where it is none."""
    root: Dim = getattr(dim, "root", dim)
    return root


def is_idle_hook(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is one of transformers' own that changes nothing here.

    Its output recorders are idle unless hidden states or attentions are asked for, and are refused then. The hook that
    gradient checkpointing puts on the embeddings only marks their output as requiring a gradient.
    """
    is_recorder = getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
    return is_recorder or getattr(hook, "__qualname__", "").endswith("make_inputs_require_grads")


class FsdpUnit(NamedTuple):
    """A module that `fully_shard` was applied to: over how many ranks, and what it does beyond averaging."""

    path: str
    num_ranks: int
    has_own_divisor: bool
    casts: bool


def fsdp_units(model: nn.Module) -> Iterator[FsdpUnit]:
    """The FSDP2 units of a model. Their process groups and policies have no public accessor."""
    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            policy = state._mp_policy
            for group in _parameter_groups(state):
                dtypes = {parameter.sharded_param.dtype for parameter in group.fsdp_params}
                yield FsdpUnit(
                    path,
                    group.mesh_info.mesh.size(),
                    group.gradient_divide_factor is not None,
                    not {policy.param_dtype, policy.output_dtype} <= {None, *dtypes},
                )


def _parameter_groups(state: Any) -> list[Any]:
    """A unit's parameters, which torch 2.13 may keep in several groups and 2.11 in one."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] if groups is None and state._fsdp_param_group is not None else groups or []
