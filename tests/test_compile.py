"""torch.compile on a transformed model: one graph, no recompilation, exact, and the packing fused by Inductor."""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from surgery import restore, transform
from surgery.verify.comparison import TOLERANCE, compare, gradients_of, relative_error
from surgery.verify.ranks import RankPool
from tests.planted import plant
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model

COMPILED_FOR, SERVED = (32, 48), (33, 64, 31, 32)
"""The first length is compiled as a constant, the second makes the dimension dynamic."""


class Ran(NamedTuple):
    """What came of a compiled model: its worst error, graph breaks, and how many programs it has."""

    worst: float
    num_breaks: int
    num_programs: int


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


def _run_lengths(
    model: Any, sp_size: int, compiled_for: tuple[int, ...], served: tuple[int, ...], backend: str = "aot_eager"
) -> Ran:
    """Run a compiled model on both lists of lengths; Dynamo may compile for the first only."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reference = copy.deepcopy(model)
    transform(model, sp_size)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    errors = [_errors(model, reference, compiled, length) for length in compiled_for]
    with torch.compiler.set_stance("fail_on_recompile"):
        errors += [_errors(model, reference, compiled, length) for length in served]
    num_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    num_programs = len(model.surgery.programs)
    restore(model)
    return Ran(max(errors), num_breaks, num_programs)


def _run_architecture(name: str, sp_size: int, is_training: bool) -> Ran:
    model = make_model(name).train(is_training)
    return _run_lengths(model, sp_size, COMPILED_FOR, SERVED)


ARCHITECTURES = [("llama", True), ("gpt2", False), ("bert", True)]
"""The last looks positions up in a table, which bounds the length."""


@pytest.mark.parametrize(("name", "is_training"), sampled(ARCHITECTURES, {("llama", True), ("bert", True)}))
def test_one_graph_for_all_lengths(world: World, name: str, is_training: bool) -> None:
    for ran in world.run(_run_architecture, name, world.sp_size, is_training):
        assert ran.num_breaks == 0 and ran.num_programs == 1
        assert ran.worst <= TOLERANCE[torch.float32]


def _weighed_by_length(x: Tensor, weight: Tensor) -> Tensor:
    return x * (2 if x.shape[1] > 40 else 1)


def _run_branch(sp_size: int) -> Ran:
    """A short length is captured while Dynamo traces, for which it makes a constant of it; a shorter one is not."""
    model = plant(make_model("llama"), _weighed_by_length)
    return _run_lengths(model, sp_size, (32, 48, 31), (12, 40, 41), backend="eager")


def test_one_graph_for_each_side_of_a_branch_on_the_length(world: World) -> None:
    for ran in world.run(_run_branch, world.sp_size):
        assert ran.num_breaks == 0 and ran.num_programs == 2
        assert ran.worst <= TOLERANCE[torch.float32]


def _cuts_after_checkpointing() -> list[bool]:
    """Whether each program, both captured before, calls layers that are to be recomputed; compiled in place."""
    torch._dynamo.reset()
    model = transform(plant(make_model("llama"), _weighed_by_length), 2)
    model.surgery.prepare(**make_batch(2, 32))
    model.gradient_checkpointing_enable()
    model.compile(backend="eager", fullgraph=True)
    model(**make_batch(2, 32))
    found = [len(program.cuts.paths) > 0 for program in model.surgery.programs]
    restore(model)
    return found


def test_every_side_of_a_branch_is_recomputed(pair: RankPool) -> None:
    assert pair.run(_cuts_after_checkpointing) == [[True, True]] * 2


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
