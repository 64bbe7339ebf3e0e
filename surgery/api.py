"""`transform` and `restore`: what a user calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.collectives import gather
from surgery.errors import ConfigurationError
from surgery.inputs.examples import example_call
from surgery.mesh import check_agreement, make_mesh
from surgery.metadata import Gradients, OnUnknown, facts_of
from surgery.model_surgery import ModelSurgery
from surgery.options import CheckInputs, Inputs, Options
from surgery.programs.installation import install, uninstall
from surgery.programs.program import Program


def transform(
    model: nn.Module | str | Path,
    sp_size: int,
    *,
    mesh: DeviceMesh | None = None,
    mpu: Any = None,
    disable_in_eval: bool = False,
    gradients: Gradients = "mean",
    on_unknown: OnUnknown = "gather",
    seq_length: int | None = None,
    seq_length_is_variable: bool = True,
    check_inputs: CheckInputs = "first",
    inputs: Inputs = "whole",
    example: Mapping[str, Any] | None = None,
) -> Any:
    """Make a Hugging Face model sequence-parallel over `sp_size` ranks, in place, and return it.

        ids, labels [B, S], whole, the same on all ranks  ->  loss, whole;  logits [B, S/P, V], sharded

    Args:
        model: the model, or a hub name or local path to load a causal language model from.
        sp_size: ranks that share a sequence; any number of them, whatever the heads and lengths.
        mesh: a `DeviceMesh` with a dimension "sp", "dp" for data parallelism, and any others. By default one is made
            of the whole world, the sp ranks of a sequence side by side.
        mpu: process groups of your own instead: an object with `get_sequence_parallel_group()`, and
            `get_data_parallel_group()` if there is data parallelism, as Megatron and DeepSpeed have them; another
            model's `surgery.mpu`; or a `DeviceMesh`.
        disable_in_eval: run the original forward, whole on every rank, in eval mode.
        gradients: "mean": the average of the ranks' gradients is the unsharded model's, as DDP, FSDP and ZeRO take it;
            "sum": their sum is.
        on_unknown: what to do with an operation that mixes tokens: "gather" runs it whole on every rank, exactly;
            "refuse" raises.
        seq_length: the length to capture with; with `seq_length_is_variable=False` the only one accepted.
        inputs: "whole": every rank passes the same batch; "sharded": each passes its slice of every sequence, in the
            order of the ranks, and gets the logits of its own tokens.
        check_inputs: compare the batch between the ranks on a signature's "first" call, "always" or "never".
        example: the whole batch of a step, by the names that the model's forward gives it: the call to capture now.
            By default ids and labels. Others are captured when they come.

    Raises:
        ConfigurationError, CaptureError, UnsupportedOperationError: what was expected, found, where, and what to do.
            The model and the process groups are then as before.
    """
    options = Options(
        sp_size, disable_in_eval, gradients, on_unknown, seq_length, seq_length_is_variable, check_inputs, inputs
    )
    model = _load(model)
    _check_model(model)
    if example is not None and not isinstance(example, Mapping):
        raise ConfigurationError(
            f"expected an example of a step's keyword arguments, found {type(example).__name__}. "
            "Pass a dict, as in model(**batch)."
        )
    if mesh is not None and mpu is not None:
        raise ConfigurationError("expected a mesh or an mpu, found both. Pass the one that has the groups to use.")
    given = mesh if mesh is not None else mpu
    groups = make_mesh(sp_size, given)
    surgery = ModelSurgery(model, options, groups)
    try:
        if groups is not None:
            check_agreement("options", options, groups.get_sequence_parallel_group() if given is not None else None)
        if sp_size > 1:
            program = surgery.prepare(**(example_call(model, seq_length) if example is None else example))
            _check_mixes_tokens(model, program)
    except BaseException:
        if groups is not None:
            groups.close()
        raise
    install(model, surgery)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `transform`: the original forward, no process groups of its own. Returns the model."""
    surgery = model.__dict__.get("surgery")
    if not isinstance(surgery, ModelSurgery):
        raise ConfigurationError(
            f"expected a transformed model, found an untouched {type(model).__name__}. Call transform() first."
        )
    uninstall(model)
    if surgery.mpu is not None:
        surgery.mpu.close()
    return model


def _load(model: nn.Module | str | Path) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    try:
        config = AutoConfig.from_pretrained(model)
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, config=config)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"expected a model, a hub name or a local path, found {str(model)!r}, which transformers cannot load: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return loaded


def _check_mixes_tokens(model: nn.Module, program: Program) -> None:
    nodes = program.graph.nodes
    is_mixed = any(facts_of(node).family in ("exchange", "gathered") or node.target is gather for node in nodes)
    if not is_mixed:
        raise ConfigurationError(
            f"{type(model).__name__} has no attention, and nothing else that mixes tokens: no two ranks would need to "
            "talk. Expected a model with attention. Split the sequences yourself, and average gradients with DDP."
        )


def _check_model(model: nn.Module) -> None:
    if "surgery" in model.__dict__:
        raise ConfigurationError(
            f"this {type(model).__name__} is transformed already. Call restore(model) before transforming it again."
        )
    if not hasattr(model, "config"):
        raise ConfigurationError(
            f"expected a transformers model with a config, found {type(model).__name__}. Load it by transformers."
        )
