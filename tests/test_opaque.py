"""Modules that no trace can follow are called live and whole: exact, refused on request, named in the report."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree as pytree

from surgery import CaptureError, UnsupportedOperationError, restore, transform
from surgery.capture import culprits
from surgery.capture.learning import learn_results
from surgery.capture.opaque_calls import Arguments, TensorSpec
from surgery.verify.comparison import compare, relative_error
from surgery.verify.ranks import RankPool
from tests.opaque_modules import (
    EXACT,
    REFUSED,
    AroundPair,
    Halving,
    Loop,
    Overwriting,
    StraightThrough,
    make_opaque,
    make_reading,
)
from tests.planted import plant, summaries_of_fours
from tests.proof import assert_exact, prove
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model

FAST = ("mamba", "jamba", "recurrent_gemma", "rwkv", "lfm2")
SLOW = ("mamba2", "bamba", "falcon_h1", "zamba2", "nemotron_h", "qwen3_next")
"""Their capture takes half a minute, of sizes that follow from chunks of tokens."""


def _prove(module_class: type[nn.Module], sp_size: int) -> dict[str, float]:
    return compare(make_opaque(module_class), sp_size, make_batch(3, 32))


@pytest.mark.parametrize("module_class", sampled(EXACT, {Loop, AroundPair, StraightThrough, Overwriting}))
def test_planted(world: World, module_class: type[nn.Module]) -> None:
    assert_exact(world.run(_prove, module_class, world.sp_size))


@pytest.mark.parametrize("name", sampled(FAST, {"mamba", "lfm2"}))
def test_architecture(pair: RankPool, name: str) -> None:
    assert_exact(pair.run(prove, name, 2))


@pytest.mark.sweep
@pytest.mark.parametrize("sp_size", [2, 4])
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_architecture_with_any_mixer(ranks: RankPool, name: str, sp_size: int) -> None:
    assert_exact(ranks.run(prove, name, sp_size))


def _prove_padded() -> dict[str, float]:
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, 27:] = 0
    return compare(make_model("jamba"), 2, {**make_batch(2, 32), "attention_mask": mask})


def test_mixers_read_the_padding(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_padded))


def _prove_checkpointed(sp_size: int) -> dict[str, float]:
    model = make_opaque(Loop)
    model.gradient_checkpointing_enable()
    return compare(model, sp_size, make_batch(2, 32))


def test_recomputed(world: World) -> None:
    assert_exact(world.run(_prove_checkpointed, world.sp_size))


def _prove_compiled() -> dict[str, float]:
    torch._dynamo.reset()
    model = make_opaque(Loop)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    return compare(model, 2, make_batch(2, 16), run=compiled)


def test_compiled_where_dynamo_can_follow(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_compiled))


def _prove_replaced(sp_size: int) -> dict[str, float]:
    """A parameter replaced after the transform, at another length and batch size, in the program of the first step."""
    model = transform(make_opaque(Loop), sp_size)
    model(**make_batch(2, 32))
    model.model.layers[0].mlp.decay = nn.Parameter(torch.linspace(0, 1, 64))
    reference: Any = restore(copy.deepcopy(model))
    errors = {}
    expected, found = (m(**make_batch(3, 48)).loss for m in (reference, model))
    errors["loss"] = relative_error(found, expected)
    expected.backward()
    found.backward()
    errors["programs"] = len(model.surgery.programs) - 1.0
    decay = model.model.layers[0].mlp.decay.grad
    dist.all_reduce(decay)
    errors["decay"] = relative_error(decay / sp_size, reference.model.layers[0].mlp.decay.grad)
    restore(model)
    return errors


def test_parameters_are_looked_up(world: World) -> None:
    assert_exact(world.run(_prove_replaced, world.sp_size))


@pytest.mark.parametrize("module_class", REFUSED)
def test_refused_by_name(module_class: type[nn.Module]) -> None:
    model = make_opaque(module_class)
    with pytest.raises(CaptureError, match=rf"(?s)did not help.*{REFUSED[module_class]}"):
        transform(model, 4)
    assert "forward" not in model.__dict__ and "forward" not in model.model.layers[0].mlp.__dict__


def test_what_one_module_leaves_for_another_is_refused() -> None:
    with pytest.raises(CaptureError, match="assigned during export"):
        transform(make_reading(), 2)


def test_refused_on_request() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"model\.layers\.0\.mlp.*Loop is called whole.*on_unknown"):
        transform(make_opaque(Loop), 4, on_unknown="refuse")


def test_named_in_the_report() -> None:
    model = transform(make_opaque(Loop), 4)
    summary = model.surgery.report().summary
    rows = [row for row in summary.gathered if row.first.operation == "Loop"]
    assert [row.path for row in rows] == ["model.layers.0.mlp"]
    assert "opaque_modules.py" in rows[0].first.reason
    (record,) = [row for row in summary.passes if row.name == "call-opaque-modules"]
    assert record.changed == 1 and "Loop" in record.skips[0].path
    assert "self.model.layers" in model.surgery.programs[0].code
    restore(model)


def test_what_was_found_once_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = transform(make_opaque(Loop), 4)
    monkeypatch.setattr(culprits.Search, "advance", lambda *_: pytest.fail("searched again"))
    for twin in (copy.deepcopy(model), model):
        twin.surgery.prepare(**make_batch(1, 32))
        assert [call.module_class for call in twin.surgery.programs[-1].context.opaque_calls] == ["Loop"]


def test_calls_of_a_trace_that_was_asked_for_anew_are_forgotten() -> None:
    """Torch is asked a second time where tokens are in groups."""
    model = transform(plant(make_opaque(Loop), summaries_of_fours), 4)
    assert [call.module_class for call in model.surgery.programs[0].context.opaque_calls] == ["Loop"]


class LoopInTraining(Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.training else torch.as_tensor(self.inner(x))


def test_what_is_traced_in_eval_mode_is_so_after_training() -> None:
    model = transform(make_opaque(LoopInTraining), 4)
    assert model.surgery.programs[0].context.opaque_calls
    model.eval().surgery.prepare(**make_batch(2, 32))
    assert not model.surgery.programs[-1].context.opaque_calls


S, B = sympy.Symbol("s", integer=True, positive=True), sympy.Symbol("b", integer=True, positive=True)


def _learn(module: nn.Module) -> Any:
    spec = pytree.tree_structure(((0,), {}))
    operand = TensorSpec((B, S, sympy.Integer(64)), torch.float32, torch.device("cpu"))
    return learn_results("mlp", module, Arguments((operand,), spec), {B: 2, S: 64})


def test_sizes_are_learnt() -> None:
    class Shapes(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.flatten(0, 1).repeat(2, 1), x.sum((1, 2)), None, {"pair": x[:1, :, :3]}

    flat, summed, nothing, pair = _learn(Shapes()).leaves
    assert flat.shape == (2 * B * S, 64) and summed.shape == (B,) and nothing is None and pair.shape == (1, S, 3)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CaptureError, match="returns a dimension of sizes"):
        _learn(Halving(nn.Identity()))


def _prove_hooked(module_class: type[nn.Module], sp_size: int) -> tuple[dict[str, float], int]:
    """FSDP2 around the opaque module itself: its own call gathers its parameters."""
    model = make_opaque(module_class)
    reference = copy.deepcopy(model)
    transform(model, sp_size)
    fully_shard(model.model.layers[0].mlp)
    fully_shard(model)
    batch = make_batch(2, 30)
    expected, found = reference(**batch).loss, model(**batch).loss
    expected.backward()
    found.backward()
    whole = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    errors = {name: relative_error(whole[name], p.grad, 1e-3) for name, p in reference.named_parameters()}
    errors["loss"] = relative_error(found, expected)
    return errors, len(model.surgery.programs)


def test_hooks_on_an_opaque_module_fire_once(world: World) -> None:
    results = world.run(_prove_hooked, Loop, world.sp_size)
    assert_exact([errors for errors, _ in results])
    assert [programs for _, programs in results] == [1] * world.sp_size
