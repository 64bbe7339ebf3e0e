"""torch.compile on a transformed model: one graph, no recompilation, exact, and the packing fused by Inductor."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from surgery import restore, transform
from surgery.verify.comparison import TOLERANCE, compare, gradients_of, relative_error
from surgery.verify.ranks import RankPool
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model

LENGTHS = (32, 48, 33, 64, 31, 32)
COMPILED_FIRST = 2  # the first length is compiled as a constant, the second makes the dimension dynamic


def _errors(model: Any, reference: Any, compiled: Any, length: int) -> float:
    batch = make_batch(2, length)
    expected, found = reference(**batch, use_cache=False), compiled(**batch)
    errors = [relative_error(found.loss, expected.loss)]
    if model.training:
        expected.loss.backward()
        found.loss.backward()
        whole = gradients_of(reference)
        group = model.surgery.mpu.get_sequence_parallel_group()
        errors += [relative_error(g, whole[name], 1e-4) for name, g in gradients_of(model, group).items()]
        model.zero_grad()
        reference.zero_grad()
    return max(errors)


def _run_lengths(name: str, sp_size: int, is_training: bool) -> tuple[float, int]:
    """The worst error over all lengths, of which only the first two may compile, and the graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(name).train(is_training)
    reference = copy.deepcopy(model)
    transform(model, sp_size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    worst = max(_errors(model, reference, compiled, length) for length in LENGTHS[:COMPILED_FIRST])
    with torch.compiler.set_stance("fail_on_recompile"):
        worst = max([worst, *(_errors(model, reference, compiled, length) for length in LENGTHS[COMPILED_FIRST:])])
    num_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    restore(model)
    return worst, num_breaks


@pytest.mark.parametrize(("name", "is_training"), sampled([("llama", True), ("gpt2", False)], {("llama", True)}))
def test_one_graph_for_all_lengths(world: World, name: str, is_training: bool) -> None:
    for worst, num_breaks in world.run(_run_lengths, name, world.sp_size, is_training):
        assert num_breaks == 0
        assert worst <= TOLERANCE[torch.float32]


def _prove_inductor() -> dict[str, float]:
    torch._dynamo.reset()
    model = make_model("llama")
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=True)
    return compare(model, 2, make_batch(2, 33), run=compiled)


@pytest.mark.sweep  # its C++ compiler takes minutes
def test_inductor_is_exact(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_inductor))


def _captured_while_compiling() -> tuple[int, float]:
    """A signature seen for the first time by Dynamo itself: no labels, and eval mode."""
    torch._dynamo.reset()
    model = transform(make_model("qwen2"), 2)
    reference = make_model("qwen2")
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    ids = make_batch(2, 32)["input_ids"]
    train = model.surgery.gather(compiled(input_ids=ids).logits)
    model.eval()
    reference_eval = reference(input_ids=ids).logits
    evaluated = model.surgery.gather(compiled(input_ids=ids).logits)
    worst = max(relative_error(train, reference_eval), relative_error(evaluated, reference_eval))
    num_programs = len(model.surgery.programs)
    restore(model)
    return num_programs, worst


def test_signatures_are_captured_while_compiling(pair: RankPool) -> None:
    for num_programs, worst in pair.run(_captured_while_compiling):
        assert num_programs == 3
        assert worst <= TOLERANCE[torch.float32]


def _compiled_copy() -> tuple[float, float]:
    """How far a changed copy, compiled, is from itself uncompiled, and from what it was copied from."""
    torch._dynamo.reset()
    batch = make_batch(2, 32)
    model = transform(make_model("llama"), 2, example=batch)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    expected = compiled(**batch).logits
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.scaling = 7.0
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    found = compiled(**batch).logits
    errors = relative_error(found, twin(**batch).logits), relative_error(found, expected)
    restore(twin)
    restore(model)
    return errors


def test_a_changed_copy_is_compiled_anew(pair: RankPool) -> None:
    for from_itself, from_original in pair.run(_compiled_copy):
        assert from_itself <= TOLERANCE[torch.float32] < from_original


def _generated_code(model: nn.Module) -> tuple[str, str]:
    """What Inductor generates to run the forward and the backward: kernel launches, collectives, matrix products."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    _, codes = run_and_get_code(lambda: compiled(**make_batch(2, 32)).loss.backward())
    forward, backward = (code[code.index("def call") :] for code in codes)
    return forward, backward


def _kernels(code: str) -> list[str]:
    return re.findall(r"^ +(cpp_fused\w+)\(", code, flags=re.MULTILINE)


@pytest.mark.sweep
@pytest.mark.usefixtures("fake_ranks")
def test_inductor_fuses_the_packing() -> None:
    """The first all-to-all is packed by the kernel that applies RoPE, and attention reads what arrives in place.

    Besides what the unsharded model has there are two kernels: one unpacks what the second all-to-all brings, one cuts
    the integer labels for the backward. The collectives are those of the eager model.
    """
    model = make_model("llama")
    whole, _ = _generated_code(copy.deepcopy(model))
    forward, backward = _generated_code(transform(model, 2, check_inputs="never"))
    assert len(_kernels(forward)) <= len(_kernels(whole)) + 2
    before, between, _ = re.split(r"_c10d_functional\.all_to_all_single\.default\(", forward)
    packing = _kernels(before)[-1]
    assert all(word in packing for word in ("cos", "sin", "cat", "neg")), packing
    assert not _kernels(between), "a kernel stands between the two all-to-alls of one attention call"
    for code in (forward, backward):
        assert code.count("all_to_all_single.default(") == 2
        assert code.count("all_reduce_.default(") == 1
