"""DDP and FSDP2 train a transformed model to the unsharded model's weights, micro-steps accumulated."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from surgery import transform
from surgery.verify.comparison import relative_error
from surgery.verify.ranks import RankPool
from tests.proof import assert_exact
from tests.refusals import refusal
from tests.sampling import sampled
from tests.training import MAX_NORM, OPTIMIZERS, Trained, errors, micro_batches, model_to_train, train_unsharded
from tests.zoo import make_batch


@functools.cache
def transformed(sp_size: int) -> Any:
    """A model to copy, captured for the steps below: its copies share the graph."""
    model = transform(model_to_train(), sp_size)
    model.surgery.prepare(**next(micro_batches(model.surgery.mpu))[0])
    return model


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def with_ddp(model: Any) -> tuple[nn.Module, Callable[[bool], None]]:
    wrapped = DistributedDataParallel(model)

    def set_sync(is_last: bool) -> None:
        wrapped.require_backward_grad_sync = is_last  # what no_sync() sets

    return wrapped, set_sync


def with_fsdp_at_the_root(model: Any) -> tuple[nn.Module, Callable[[bool], None]]:
    return fully_shard(model), model.set_requires_gradient_sync


def with_fsdp_per_layer(model: Any) -> tuple[nn.Module, Callable[[bool], None]]:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model), model.set_requires_gradient_sync


def with_fsdp_everywhere(model: Any) -> tuple[nn.Module, Callable[[bool], None]]:
    """Units within units: projections, layers, embeddings, the head with the norm before it, and what is left."""
    for layer in model.model.layers:
        fully_shard(layer.mlp.up_proj)
        fully_shard(layer.self_attn)
    fully_shard(model.model.embed_tokens)
    fully_shard([model.model.norm, model.lm_head])
    return with_fsdp_per_layer(model)


def with_fsdp_and_checkpointing(model: Any) -> tuple[nn.Module, Callable[[bool], None]]:
    model.gradient_checkpointing_enable()
    return with_fsdp_per_layer(model)


Engine = Callable[[Any], tuple[nn.Module, Callable[[bool], None]]]


def train(model: Any, engine: Engine, optimizer: str, *, clips: bool) -> Trained:
    """Five steps of two micro-steps, gradients exchanged in the second."""
    wrapped, set_sync = engine(model)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    found: list[tuple[dict[str, Tensor], float]] = []
    for batches in micro_batches(model.surgery.mpu):
        for batch in batches:
            set_sync(batch is batches[-1])
            wrapped(**batch).loss.backward()
        gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM if clips else float("inf"))
        found.append((gradients, float(whole(norm))))
        stepper.step()
        stepper.zero_grad()
    return Trained(*found[0], {name: whole(p.detach()).clone() for name, p in model.named_parameters()})


def _prove(engine: Engine, sp_size: int) -> dict[str, float]:
    """Five steps of SGD as they are, and of AdamW with clipping."""
    worst: dict[str, float] = {}
    for optimizer, clips in (("sgd", False), ("adamw", True)):
        expected = train_unsharded(model_to_train(), optimizer, clips=clips)
        model = copy.deepcopy(transformed(sp_size))
        captured = len(model.surgery.programs)
        found = errors(train(model, engine, optimizer, clips=clips), expected)
        assert len(model.surgery.programs) == captured, "an engine must not capture again"
        worst |= {f"{optimizer} {name}": error for name, error in found.items()}
    return worst


WORLDS = [(engine, sp_size) for engine in (with_ddp, with_fsdp_at_the_root, with_fsdp_per_layer) for sp_size in (2, 4)]


@pytest.mark.parametrize(("engine", "sp_size"), sampled(WORLDS, {(with_ddp, 2), (with_fsdp_per_layer, 2)}))
def test_trains_to_the_unsharded_weights(ranks: RankPool, engine: Engine, sp_size: int) -> None:
    assert_exact(ranks.run(_prove, engine, sp_size))


@pytest.mark.parametrize("engine", [with_fsdp_everywhere, with_fsdp_and_checkpointing])
def test_units_within_units_and_checkpointing(ranks: RankPool, engine: Engine) -> None:
    assert_exact(ranks.run(_prove, engine, 2))


def _released() -> tuple[bool, bool]:
    """Between forward and backward: whether the layers' parameters are sharded, and whether the others are whole."""
    model = copy.deepcopy(transformed(2))
    with_fsdp_per_layer(model)
    model(**next(micro_batches(model.surgery.mpu))[0])
    layers = all(isinstance(parameter, DTensor) for parameter in model.model.layers.parameters())
    return layers, not isinstance(model.lm_head.weight, DTensor)


def test_layers_are_released_behind_their_forward(ranks: RankPool) -> None:
    assert ranks.run(_released) == [(True, True)] * 4


def _captured_when_sharded() -> dict[str, float]:
    """Signatures first met when the parameters are sharded: another batch size, and evaluation without labels."""
    expected, model = model_to_train(), copy.deepcopy(transformed(2))
    wrapped, _ = with_fsdp_per_layer(model)
    batch = make_batch(1, 32)
    found = {"loss": relative_error(wrapped(**batch).loss, expected(**batch).loss)}
    ids = make_batch(2, 32)["input_ids"]
    with torch.no_grad():
        logits = expected.eval()(input_ids=ids, use_cache=False).logits
        found["logits"] = relative_error(model.surgery.gather(wrapped.eval()(input_ids=ids).logits), logits)
    return found


def test_captures_a_model_that_is_sharded_already(ranks: RankPool) -> None:
    assert_exact(ranks.run(_captured_when_sharded))


def _sharded_before_the_transform() -> dict[str, float]:
    expected, model = model_to_train(), model_to_train()
    with_fsdp_per_layer(model)
    transform(model, 4)
    batch = make_batch(2, 32)
    return {"loss": relative_error(model(**batch).loss, expected(**batch).loss)}


def test_sharded_before_the_transform(ranks: RankPool) -> None:
    assert_exact(ranks.run(_sharded_before_the_transform))


def _refusals() -> dict[str, str]:
    """What a call says of engines that would scale gradients or cast activations."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"]
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "sum": (transform(model_to_train(), 2, gradients="sum"), {}),
        "mesh": (copy.deepcopy(transformed(2)), {"mesh": mesh}),
        "policy": (copy.deepcopy(transformed(2)), {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}),
    }
    found = {}
    for name, (model, options) in models.items():
        fully_shard(model.model.layers[1], **options)
        fully_shard(model)
        found[name] = refusal(functools.partial(model, **make_batch(2, 32)))
    return found


def test_what_would_scale_gradients_is_refused(ranks: RankPool) -> None:
    for found in ranks.run(_refusals):
        assert "gradients='sum', and FSDP averages over all ranks" in found["sum"]
        assert "model.layers.1 is sharded over 2 ranks, and gradients are addends on all 4" in found["mesh"]
        assert "mixed precision policy of model.layers.1" in found["policy"]
