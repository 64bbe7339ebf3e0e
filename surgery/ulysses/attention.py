"""`UlyssesSPAttentionHF`: one attention function on sequence shards, by hand; or a whole model, by `transform`.

    q, k, v [B, N, S/P, H] --all-to-all--> [B, N/P, S, H] --attn--> [B, S, N/P, H] --all-to-all--> [B, S/P, N*H]

The constructor wraps a function of transformers' signature for model code that calls it on shards. What the function
is told besides is made whole first (`surgery/ulysses/arguments.py`). `register_with_transformers` needs no such
function: it hands the model, or the models that a name will load, to `surgery.transform`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery.api import transform
from surgery.axis import Axis
from surgery.errors import ConfigurationError, InputError, LaunchError
from surgery.exchange.heads import exchange_to_heads, exchange_to_sequence
from surgery.inputs.checks import how_to_launch
from surgery.mesh import make_mesh
from surgery.options import Options
from surgery.randomness import rank_stream
from surgery.ulysses import registration
from surgery.ulysses.arguments import WholeArguments


class UlyssesSPAttentionHF(nn.Module):
    """Wraps `attn(module, query, key, value, attention_mask, *args, **kwargs)`, to be called with sequence shards.

    Every rank of `process_group` calls it with its slice of the same sequences, in the order of the ranks: heads as
    many as the model has, keys and values un-repeated, any batch size. It returns what `attn` gives for this rank's
    tokens, [B, S/P, N*H], and None for the attention weights. Under torch.compile it is a graph break.

    Args:
        attn: the core attention function: transformers', or one of its signature. It gets whole sequences and this
            rank's heads.
        batch_size: not relied on: any batch is taken.
        attn_head_count, attn_head_size, kv_head_count: N, H and Nk of the model.
        num_hidden_layers: not relied on.
        process_group: the ranks that share a sequence.
        seq_length_is_variable: whether lengths may change; otherwise only `global_seq_length` is taken, of which each
            rank passes `local_seq_length`.
        disable_in_eval: call `attn` as it is where `module` is in eval mode.

    Raises:
        ConfigurationError: head counts that an exchange cannot spread.
        InputError: shapes that differ from those above; masks, positions or keywords that cannot be made whole.
    """

    def __init__(
        self,
        attn: Callable[..., Any],
        batch_size: int,
        attn_head_count: int,
        attn_head_size: int,
        kv_head_count: int,
        num_hidden_layers: int,
        process_group: dist.ProcessGroup,
        seq_length_is_variable: bool = False,
        local_seq_length: int | None = None,
        global_seq_length: int | None = None,
        disable_in_eval: bool = False,
    ) -> None:
        super().__init__()
        self.attn = attn
        self.batch_size = batch_size
        self.attn_head_count = attn_head_count
        self.attn_head_size = attn_head_size
        self.kv_head_count = kv_head_count
        self.num_hidden_layers = num_hidden_layers
        self.process_group = process_group
        self.seq_length_is_variable = seq_length_is_variable
        self.local_seq_length = local_seq_length
        self.global_seq_length = global_seq_length
        self.disable_in_eval = disable_in_eval
        self.axis = Axis(process_group.size(), process_group.rank(), process_group.group_name)
        self._whole = WholeArguments(attn, self.axis, attn_head_count)
        self._check_construction()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if self.axis.size == 1 or (self.disable_in_eval and not module.training):
            return self.attn(module, query, key, value, attention_mask, *args, **kwargs)
        self._check_call(query, key, value)
        mask, kwargs, length = self._whole(module, query, attention_mask, kwargs)
        own_query, own_key, own_value = exchange_to_heads(query, key, value, length, self.axis)
        is_dropping = kwargs.get("dropout", 0.0) > 0.0
        with (
            _own_groups(module, own_query.shape[1] // own_key.shape[1]),
            rank_stream(self.axis.rank, query.device) if is_dropping else nullcontext(),
        ):
            output, _ = self.attn(module, own_query, own_key, own_value, mask, *args, **kwargs)
        by_heads = output.reshape(*own_query.shape[:1], own_query.shape[2], own_query.shape[1], -1).transpose(1, 2)
        return exchange_to_sequence(by_heads, self.attn_head_count, self.axis).transpose(1, 2).flatten(2), None

    def _check_construction(self) -> None:
        heads, kv_heads, size = self.attn_head_count, self.kv_head_count, self.axis.size
        if heads % size or (kv_heads % size and size % kv_heads):
            raise ConfigurationError(
                f"expected attn_head_count to divide over {size} ranks, and kv_head_count over them or they over it; "
                f"found {heads} and {kv_heads}. Use a smaller process_group, or transform(): it takes any counts."
            )
        fixed = (self.local_seq_length, self.global_seq_length)
        if not self.seq_length_is_variable and (fixed[0] is None or fixed[1] != fixed[0] * size):
            raise ConfigurationError(
                f"expected, with seq_length_is_variable=False, a global_seq_length of {size} times local_seq_length; "
                f"found {fixed[1]} and {fixed[0]}. Pass both, or seq_length_is_variable=True."
            )

    def _check_call(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        local = query.shape[2] if self.seq_length_is_variable else self.local_seq_length
        expected = {
            "query": (self.attn_head_count, local, self.attn_head_size),
            "key": (self.kv_head_count, local, self.attn_head_size),
            "value": (self.kv_head_count, local, value.shape[-1]),  # a head size of its own, where a model has one
        }
        for (name, shape), tensor in zip(expected.items(), (query, key, value), strict=True):
            if tuple(tensor.shape[1:]) != shape:
                raise InputError(
                    f"expected {name} [B, {', '.join(map(str, shape))}], this rank's slice with all heads, keys and "
                    f"values un-repeated; found {list(tensor.shape)}. Pass what the projections give."
                )

    @classmethod
    def register_with_transformers(
        cls,
        model_name_or_path: nn.Module | str | Path,
        core_attn_implementation: str,
        sequence_parallel_size: int,
        micro_batch_size: int,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
    ) -> Any:
        """Transform a model, or those that a name or path loads from now on, for slices as inputs. Returns the mpu.

        The mpu is ready before the model is, and None for one rank. The model is given slices of its batches, as
        `UlyssesSPDataLoaderAdapter` cuts them; its loss is whole, its logits are those of the slice.
        `surgery.ulysses.forget(name)` ends what a name started.

        Args:
            core_attn_implementation: what the model runs: a name in transformers' attention registry.
            micro_batch_size: not relied on: any batch is taken.
            seq_length: of whole sequences; with `seq_length_is_variable=False` the only one that is taken.

        Raises:
            ConfigurationError, CaptureError, UnsupportedOperationError: nothing was registered and no group made, and a
                correct call can follow.
        """
        size = sequence_parallel_size
        Options(size, disable_in_eval, seq_length=seq_length, seq_length_is_variable=seq_length_is_variable)
        if size == 1:
            return None
        _check_registration(model_name_or_path, core_attn_implementation, micro_batch_size)
        options: dict[str, Any] = {
            "inputs": "sharded",
            "seq_length": None if seq_length_is_variable else seq_length,
            "seq_length_is_variable": seq_length_is_variable,
            "disable_in_eval": disable_in_eval,
        }
        if not dist.is_initialized():
            raise LaunchError(how_to_launch(size))
        if isinstance(model_name_or_path, nn.Module):
            return transform(model_name_or_path, size, **options).surgery.mpu
        mpu = make_mesh(size)
        apply = partial(transform, sp_size=size, mpu=mpu, **options)
        registration.register(model_name_or_path, registration.Registration(core_attn_implementation, apply))
        return mpu


def _check_registration(model: Any, attention: str, micro_batch_size: int) -> None:
    names = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    if attention not in names:
        raise ConfigurationError(
            f"expected core_attn_implementation to be one of {', '.join(names)}; found {attention!r}. Register it with "
            "transformers' AttentionInterface first, if it is yours."
        )
    if type(micro_batch_size) is not int or micro_batch_size < 1:
        raise ConfigurationError(
            f"expected micro_batch_size to be a positive integer, found {micro_batch_size!r}. Pass one."
        )
    if isinstance(model, nn.Module):
        registration.check_attention(model, attention)
        return
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"expected a model, a hub name or a local path, found {str(model)!r}, which transformers cannot load: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextmanager
def _own_groups(module: nn.Module, num_groups: int) -> Iterator[None]:
    """Let `module` say how many of this rank's query heads share a key head, while `attn` repeats by it."""
    previous = getattr(module, "num_key_value_groups", None)
    if previous is None:
        yield
        return
    module.num_key_value_groups = num_groups  # type: ignore[assignment]
    try:
        yield
    finally:
        module.num_key_value_groups = previous
