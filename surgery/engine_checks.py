"""Whether the engine that drives a model combines gradients as the transform has scaled them, and keeps its dtypes.

    gradients="mean"      DDP, FSDP and ZeRO average over all dp x sp ranks
    gradients="sum"       a loop that adds gradients up over sp, and averages over dp, by itself

A wrong pairing trains, on gradients that are off by P, so it is refused where the engine can be seen from the model.
"""

from __future__ import annotations

from torch import nn

from surgery.engines import deepspeed_engine
from surgery.errors import ConfigurationError
from surgery.mesh import SequenceMesh
from surgery.metadata import Gradients
from surgery.private import FsdpUnit, fsdp_units


def check_engine(model: nn.Module, gradients: Gradients, mpu: SequenceMesh) -> None:
    """Raise `ConfigurationError` where an engine would scale gradients or cast activations."""
    engine, units = deepspeed_engine(model), list(fsdp_units(model))
    if engine is None and not units:
        return
    num_ranks = mpu.get_sequence_data_parallel_world_size()
    if engine is not None:
        _check_mean("DeepSpeed", gradients)
        if engine.sequence_parallel_size != 1 or engine.seq_dp_world_size != num_ranks:
            raise ConfigurationError(
                f"DeepSpeed was given an mpu of its own: it counts {engine.sequence_parallel_size} sequence-parallel "
                f"ranks, by which it multiplies gradients, and reduces over {engine.seq_dp_world_size}. Expected the "
                f"transformed model's, over all {num_ranks}. Call deepspeed.initialize(mpu=model.surgery.mpu)."
            )
    for unit in units:
        _check_unit(unit, gradients, num_ranks)


def _check_mean(engine: str, gradients: Gradients) -> None:
    if gradients == "sum":
        raise ConfigurationError(
            f"the model was transformed with gradients='sum', and {engine} averages over all ranks: every gradient "
            "would be divided by sp_size. Transform with gradients='mean', the default."
        )


def _check_unit(unit: FsdpUnit, gradients: Gradients, num_ranks: int) -> None:
    if not unit.has_own_divisor:
        _check_mean("FSDP", gradients)
    if unit.num_ranks != num_ranks:
        raise ConfigurationError(
            f"{unit.path or 'the model'} is sharded over {unit.num_ranks} ranks, and gradients are addends on all "
            f"{num_ranks} (dp x sp). Expected FSDP over all of them. Leave out mesh=, or pass one of the whole world."
        )
    if unit.casts:
        raise ConfigurationError(
            f"the mixed precision policy of {unit.path or 'the model'} casts parameters or activations, and the graph "
            "was captured for the dtypes of the parameters. Expected a policy of reduce_dtype at most. Cast the model "
            "instead: model.to(torch.bfloat16)."
        )
