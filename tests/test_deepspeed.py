"""DeepSpeed trains a transformed model to the unsharded model's weights, in every stage of ZeRO."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from surgery import SurgeryError, transform
from surgery.verify.comparison import relative_error
from surgery.verify.ranks import RankPool
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.training import (
    MAX_NORM,
    MICRO_STEPS,
    OPTIMIZERS,
    Trained,
    errors,
    micro_batches,
    model_to_train,
    train_unsharded,
    worst_error,
)
from tests.worlds import World
from tests.zoo import make_batch, make_model

deepspeed.ops.__compatible_ops__ = {}  # it would build an operator in C++ for ranks that share memory: a minute
STAGES = (0, 1, 2, 3)
STEPS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": MICRO_STEPS,
    "zero_allow_untested_optimizer": True,
}


CASES = [(world, stage) for world in ("2 ranks, sp 2", "4 ranks, sp 2", "4 ranks, sp 4") for stage in STAGES]


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Ranks of this file's own, as DeepSpeed keeps process groups in globals; where there are two, `pair`'s."""
    num_ranks, _, _, sp_size = request.param.replace(",", "").split()
    if num_ranks == "2":
        yield World(request.getfixturevalue("pair"), int(sp_size))
        return
    pool = RankPool(int(num_ranks))
    yield World(pool, int(sp_size))
    pool.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@functools.cache
def transformed(sp_size: int) -> Any:
    """A model to copy, captured for the steps below: its copies share the graph."""
    model = transform(model_to_train(), sp_size)
    model.surgery.prepare(**next(micro_batches(model.surgery.mpu))[0])
    return model


def initialize(model: Any, stage: int, optimizer: str = "sgd", **config: Any) -> Any:
    """What a user writes. Parameters of more than 100 numbers are sharded in stage 3; as a rule those of 100,000."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, **config.pop("zero", {})}
    mpu = config.pop("mpu", model.surgery.mpu)
    engine, *_ = deepspeed.initialize(
        model=model,
        mpu=mpu,
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        config={**STEPS_CONFIG, "zero_optimization": zero, **config},
    )
    return engine


def whole_gradients(engine: Any) -> dict[str, Tensor]:
    def gradient(parameter: Any) -> Tensor:
        return parameter.grad if engine.zero_optimization_stage() == 0 else safe_get_full_grad(parameter)

    return {name: gradient(p).clone() for name, p in engine.module.named_parameters()}


def whole_weights(engine: Any) -> dict[str, Tensor]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def step(engine: Any, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """An optimizer's step, and its gradients. DeepSpeed averages over micro-steps: each has a share of the labels."""
    gradients: dict[str, Tensor] = {}
    for batch in batches:
        share = batch["num_items_in_batch"] / MICRO_STEPS
        engine.backward(engine(**{**batch, "num_items_in_batch": share}).loss)
        if batch is batches[-1]:
            gradients = whole_gradients(engine)
        engine.step()
    return gradients


def train(engine: Any) -> Trained:
    found: list[tuple[dict[str, Tensor], float]] = []
    for batches in micro_batches(engine.module.surgery.mpu):
        gradients = step(engine, batches)
        norm = engine.get_global_grad_norm()
        if norm is None:  # stage 0 takes none unless it clips
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        found.append((gradients, float(norm)))
    return Trained(*found[0], whole_weights(engine))


def _prove(stage: int, sp_size: int) -> dict[str, float]:
    """Five steps of SGD as they are, and of AdamW with clipping."""
    runs = {"sgd": _prove_steps(stage, sp_size), "adamw": _prove_steps(stage, sp_size, "adamw", clips=True)}
    return {f"{optimizer} {name}": error for optimizer, found in runs.items() for name, error in found.items()}


def _prove_steps(
    stage: int,
    sp_size: int,
    optimizer: str = "sgd",
    *,
    clips: bool = False,
    is_checkpointed: bool = False,
    **config: Any,
) -> dict[str, float]:
    """Five steps under an engine: gradients, norm and weights against the unsharded model's."""
    expected = train_unsharded(model_to_train(), optimizer, clips=clips)
    model = copy.deepcopy(transformed(sp_size))
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    captured = len(model.surgery.programs)
    engine = initialize(model, stage, optimizer, gradient_clipping=MAX_NORM if clips else 0.0, **config)
    found = errors(train(engine), expected)
    engine.destroy()
    assert len(model.surgery.programs) == captured, "an engine must not capture again"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), sampled(CASES, {CASES[0], CASES[3], CASES[6]}), indirect=["world"])
def test_trains_to_the_unsharded_weights(world: World, stage: int) -> None:
    assert_exact(world.run(_prove, stage, world.sp_size))


def test_stage_3_by_its_other_way_of_reducing(pair: RankPool) -> None:
    """Without reduce-scatter, stage 3 multiplies by the sequence-parallel size it knows of; with it, it does not."""
    assert_exact(pair.run(_prove_steps, 3, 2, zero={"reduce_scatter": False}))


def test_stage_3_with_gradient_checkpointing(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_steps, 3, 2, is_checkpointed=True))


def test_stage_3_with_layers_as_units(pair: RankPool) -> None:
    """`leaf_module` of the config: a decoder layer is gathered as one."""
    leaves = {"leaf_module": {"classes": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]}}
    assert_exact(pair.run(_prove_steps, 3, 2, zero=leaves))


def _prove_architecture(name: str, **changes: Any) -> dict[str, float]:
    expected = make_model(name, **changes)
    engine = initialize(transform(make_model(name, **changes), 2), 3, gradient_accumulation_steps=1)
    batch = make_batch(2, 32)
    loss = engine(**batch).loss
    engine.backward(loss)
    gradients = whole_gradients(engine)
    engine.destroy()
    whole_loss = expected(**batch, use_cache=False).loss
    whole_loss.backward()
    wanted = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    return {"loss": relative_error(loss, whole_loss), "gradients": worst_error(gradients, wanted)}


TIED = {"qwen2": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("name", sampled(["qwen2", "gpt2", "mixtral"], {"qwen2", "mixtral"}))
def test_stage_3_of_other_architectures(pair: RankPool, name: str) -> None:
    """Embeddings that are the head as well, weights that are read transposed, experts."""
    assert_exact(pair.run(_prove_architecture, name, **TIED.get(name, {})))


def _releases() -> tuple[list[str], int, int]:
    """Under stage 3, parameters that are still whole between forward and backward, and what is kept for it."""
    model = copy.deepcopy(transformed(2))
    weights = sum(parameter.numel() for parameter in model.parameters())
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() if tensor.ndim == 2 and tensor.is_floating_point() and not tensor.requires_grad else 0
        return tensor

    engine = initialize(model, 3, zero={"stage3_param_persistence_threshold": 0})
    batch = next(micro_batches(model.surgery.mpu))[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(**batch).loss
    held = [name for name, p in model.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
    engine.backward(loss)
    engine.destroy()
    return held, kept, weights


def test_stage_3_keeps_no_whole_parameter_for_the_backward(pair: RankPool) -> None:
    for held, kept, weights in pair.run(_releases):
        assert held == []
        assert kept < weights / 2, "views of gathered weights are kept"


def _captures_when_sharded() -> dict[str, float]:
    """A signature first met under stage 3: evaluation without labels, of a model with tied embeddings."""
    reference = model_to_train(tie_word_embeddings=True).eval()
    engine = initialize(transform(model_to_train(tie_word_embeddings=True), 2), 3)
    model = engine.module
    engine.eval()
    ids = make_batch(2, 32)["input_ids"]
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits
        found = model.surgery.gather(engine(input_ids=ids).logits)
    engine.destroy()
    return {"logits": relative_error(found, expected)}


def test_captures_a_model_that_is_sharded_already(pair: RankPool) -> None:
    assert_exact(pair.run(_captures_when_sharded))


def _reloads(stage: int, directory: str) -> dict[str, float]:
    """The loss of an unsharded model that loads what the engine saved, and the weights."""
    engine = initialize(copy.deepcopy(transformed(2)), stage)
    step(engine, next(micro_batches(engine.module.surgery.mpu)))
    expected = whole_weights(engine)
    engine.save_checkpoint(directory, tag="last")
    engine.destroy()
    dist.barrier()
    if stage == 0:
        saved = torch.load(Path(directory, "last", "mp_rank_00_model_states.pt"), weights_only=False)["module"]
    else:
        saved = get_fp32_state_dict_from_zero_checkpoint(directory)
    model = model_to_train(seed=1)
    model.load_state_dict(saved)
    return {name: relative_error(p, expected[name]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", sampled(STAGES, {0, 3}))
def test_checkpoints_load_into_an_unsharded_model(pair: RankPool, stage: int, tmp_path: Path) -> None:
    assert_exact(pair.run(_reloads, stage, str(tmp_path)))


def _in_bfloat16() -> float:
    """The worst gradient of stage 3 in bf16, as a share of the largest in float32."""
    expected = train_unsharded(model_to_train(), "sgd", clips=False).gradients
    engine = initialize(copy.deepcopy(transformed(2)), 3, bf16={"enabled": True})
    found = step(engine, next(micro_batches(engine.module.surgery.mpu)))
    engine.destroy()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items()) / largest


def test_bfloat16_captures_again_when_sharded(pair: RankPool) -> None:
    assert max(pair.run(_in_bfloat16)) <= 0.06, "as tests/test_exactness.py allows bf16 without an engine"


def _refusals() -> dict[str, str]:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    found = {}
    parallel_state_sp.initialize_sequence_parallel(2)
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "sum": (transform(model_to_train(), 2, gradients="sum"), {}),
        "another mpu": (transform(model_to_train(), 2), {"mpu": parallel_state_sp}),
    }
    for name, (model, config) in models.items():
        engine = initialize(model, 1, **config)
        try:
            engine(**make_batch(2, 32))
            found[name] = "no error"
        except SurgeryError as error:
            found[name] = f"{type(error).__name__}: {error}"
        engine.destroy()
    return found


def test_what_would_scale_gradients_is_refused(pair: RankPool) -> None:
    for found in pair.run(_refusals):
        assert "gradients='sum'" in found["sum"] and "gradients='mean'" in found["sum"]
        assert "mpu=model.surgery.mpu" in found["another mpu"]
