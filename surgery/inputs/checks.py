"""Whether a call can be answered exactly: refused otherwise, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import InputError
from surgery.inputs.signature import CACHES, BoundCall, has_cache
from surgery.options import Options

RECORDED_OUTPUTS = ("output_attentions", "output_hidden_states")


def check_call(call: BoundCall, options: Options, is_training: bool) -> None:
    """Raise `InputError` for a length that does not fit, or for outputs and caches that the graph does not have."""
    _check_length(call.length, options)
    for name in RECORDED_OUTPUTS:
        if call.constants.get(name):
            raise InputError(
                f"{name}=True: the captured graph does not keep what it computes on the way. Expected it off. "
                "Call restore(model) to record, or run the unsharded model."
            )
    for name in CACHES:
        if is_training and name in call.constants:
            raise InputError(
                f"{name} in training mode: every rank would attend to the cache of its own run. Expected no cache. "
                "Call model.eval() to decode."
            )


def check_bypass(kwargs: Mapping[str, Any], options: Options, *, is_generating: bool) -> None:
    """Raise `InputError` for a slice of a batch that would run through the original forward as if it were whole."""
    if options.inputs == "sharded" and options.sp_size > 1 and has_cache(kwargs) and not is_generating:
        raise InputError(
            "a key-value cache is kept by the original forward, which takes whole sequences, and inputs='sharded' "
            "passes slices. Expected use_cache=False. Call model.generate() with the whole prompt to decode."
        )


def _check_length(length: int, options: Options) -> None:
    if not options.seq_length_is_variable and length != options.seq_length:
        raise InputError(
            f"expected sequences of {options.seq_length} tokens, as the model was transformed for, found {length}. "
            "Pad to that length, or transform with seq_length_is_variable=True."
        )


def how_to_launch(sp_size: int) -> str:
    """What to tell someone who calls a model that was transformed without a process group."""
    return (
        f"this model was transformed for {sp_size} ranks without a process group, so it can be looked at but not run. "
        f"Launch {sp_size} processes (torchrun --nproc-per-node {sp_size} script.py), and call "
        "torch.distributed.init_process_group() before transform()."
    )
