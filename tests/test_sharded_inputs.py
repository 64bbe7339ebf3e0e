"""`inputs="sharded"`: every rank passes its slice, and gets what the unsharded model gives for the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from surgery import restore, transform
from surgery.axis import run_lengths
from surgery.inputs.sharded_inputs import overlap
from surgery.verify.comparison import SMALLEST_SHARE, float_is_double, gradients_of, relative_error
from surgery.verify.ranks import RankPool
from tests.counting import CollectiveCounter
from tests.proof import assert_exact
from tests.refusals import refusal
from tests.zoo import make_batch, make_model

LENGTH = 32
CUTS = {"even": (8, 8, 8, 8), "uneven": (12, 5, 9, 6), "one has none": (29, 2, 0, 1)}


def cut(batch: dict[str, Any], runs: tuple[int, ...]) -> dict[str, Any]:
    """This rank's slice of every input of a batch, in dim 1."""
    rank = dist.get_rank() % len(runs)
    start = sum(runs[:rank])
    return {name: tensor[:, start : start + runs[rank]] for name, tensor in batch.items()}


def slice_errors(
    model: Any, reference: Any, batch: dict[str, Any], slices: dict[str, Any], runs: tuple[int, ...]
) -> dict[str, float]:
    """Relative errors of the loss, of this rank's own logits, and of every gradient, averaged over the ranks."""
    model.zero_grad()
    reference.zero_grad()
    expected, found = reference(**batch, use_cache=False), model(**slices)
    own = cut({"logits": expected.logits}, runs)["logits"]
    assert found.logits.shape == own.shape
    expected.loss.backward()
    found.loss.backward()
    whole = gradients_of(reference)
    floor = SMALLEST_SHARE * max(float(gradient.abs().max()) for gradient in whole.values())
    gradients = gradients_of(model, model.surgery.mpu.get_sequence_parallel_group())
    return {
        "logits": relative_error(found.logits, own) if own.numel() else 0.0,
        "gathered": relative_error(model.surgery.gather(found.logits), expected.logits),
        "loss": relative_error(found.loss, expected.loss),
        **{name: relative_error(gradient, whole[name], floor) for name, gradient in gradients.items()},
    }


def _plain(runs: tuple[int, ...]) -> dict[str, Any]:
    return make_batch(2, sum(runs))


def _packed(runs: tuple[int, ...]) -> dict[str, Any]:
    positions = torch.cat([torch.arange(11), torch.arange(sum(runs) - 11)]).expand(2, -1)
    return {**make_batch(2, sum(runs)), "position_ids": positions}


def _padded(runs: tuple[int, ...]) -> dict[str, Any]:
    """Padding on the left of the first sequence."""
    batch = make_batch(2, sum(runs))
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :10] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def _shifted(runs: tuple[int, ...]) -> dict[str, Any]:
    batch = make_batch(2, sum(runs))
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return {**batch, "shift_labels": shifted}


BATCHES: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "positions left out": _plain,
    "packed": _packed,
    "padded": _padded,
    "shift_labels": _shifted,
}


def _prove(kind: str, cuts: tuple[tuple[int, ...], ...], name: str = "llama", **changes: Any) -> dict[str, float]:
    model = make_model(name, **changes)
    reference = copy.deepcopy(model)
    transform(model, len(cuts[0]), inputs="sharded")
    errors: dict[str, float] = {}
    for runs in cuts:
        batch = BATCHES[kind](runs)
        found = slice_errors(model, reference, batch, cut(batch, runs), runs)
        errors |= {f"{runs} {what}": error for what, error in found.items()}
    restore(model)
    return errors


@pytest.mark.parametrize("kind", BATCHES)
def test_slices(pair: RankPool, kind: str) -> None:
    assert_exact(pair.run(_prove, kind, ((16, 16), (20, 12))))


def test_slices_of_different_lengths(ranks: RankPool) -> None:
    assert_exact(ranks.run(_prove, "packed", tuple(CUTS.values())))


def test_on_a_grid(ranks: RankPool) -> None:
    assert_exact(ranks.run(_prove, "padded", ((20, 12),), "qwen3"))


def _prove_double() -> dict[str, float]:
    with float_is_double():
        return _prove("packed", ((20, 12),), dtype=torch.float64)


def test_double_precision(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_double), torch.float64)


def _prove_embeddings() -> dict[str, float]:
    """`inputs_embeds` made from weights of the caller's: their gradient averages to the unsharded one too."""
    model = make_model("llama")
    reference = copy.deepcopy(model)
    transform(model, 2, inputs="sharded")
    errors: dict[str, float] = {}
    for runs in ((16, 16), (20, 12)):
        source, labels = torch.randn(2, LENGTH, 64), make_batch(2, LENGTH)["labels"]
        dist.broadcast(source, 0)
        whole_scale, scale = (torch.ones(64, requires_grad=True) for _ in range(2))
        whole = {"inputs_embeds": source * whole_scale, "labels": labels}
        slices = cut({"inputs_embeds": source * scale, "labels": labels}, runs)
        found = slice_errors(model, reference, whole, slices, runs)
        assert scale.grad is not None and whole_scale.grad is not None
        dist.all_reduce(scale.grad)
        found["scale"] = relative_error(scale.grad / 2, whole_scale.grad)
        errors |= {f"{runs} {what}": error for what, error in found.items()}
    restore(model)
    return errors


def test_embeddings(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_embeddings))


def _rows_of_a_mask() -> dict[str, float]:
    """The rows of this rank's tokens, over all keys, of an explicit mask [B, 1, S, S]."""
    runs = (20, 12)
    model, batch = make_model("llama"), make_batch(2, LENGTH)
    reference = copy.deepcopy(model)
    transform(model, 2, inputs="sharded")
    mask = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = (mask | torch.eye(LENGTH, dtype=torch.bool)).tril()
    rows = cut({"mask": mask.movedim(2, 1)}, runs)["mask"].movedim(1, 2)
    slices = {**cut(batch, runs), "attention_mask": rows}
    errors = slice_errors(model, reference, {**batch, "attention_mask": mask}, slices, runs)
    restore(model)
    return errors


def test_rows_of_a_mask(pair: RankPool) -> None:
    assert_exact(pair.run(_rows_of_a_mask))


def _count() -> tuple[dict[str, int], list[int], dict[str, int]]:
    model = transform(make_model("llama", num_hidden_layers=2), 2, inputs="sharded")
    batch = cut(_packed((16, 16)), (16, 16))
    model(**batch)
    with CollectiveCounter() as forward:
        loss = model(**batch).loss
    with CollectiveCounter() as backward:
        loss.backward()
    restore(model)
    return dict(forward.calls), forward.sizes_bytes["all_gather_into_tensor"], dict(backward.calls)


def test_two_small_all_gathers_a_step_and_none_a_layer(pair: RankPool) -> None:
    for forward, gathered_bytes, backward in pair.run(_count):
        assert forward == {"all_gather_into_tensor": 2, "all_to_all_single": 4, "all_reduce": 1}
        num_inputs, tokens, integer_bytes = 3, 2 * LENGTH // 2, 8
        assert gathered_bytes == [4 * integer_bytes, num_inputs * tokens * integer_bytes]
        assert backward == {"all_to_all_single": 4, "all_reduce": 1}


def _refused() -> dict[str, str]:
    rank = dist.get_rank()
    model = transform(make_model("llama"), 4, inputs="sharded", check_inputs="always")
    whole = _packed(CUTS["even"])
    batch = cut(whole, CUTS["even"])
    found = {
        "whole positions": refusal(lambda: model(**{**batch, "position_ids": whole["position_ids"]})),
        "on one rank": refusal(lambda: model(**(batch if rank else {**batch, "labels": whole["labels"]}))),
        "arguments": refusal(lambda: model(**dict(list(batch.items())[: 3 - rank % 2]))),
        "batch size": refusal(lambda: model(**cut(make_batch(1 + rank, LENGTH), CUTS["even"]))),
        "own keys": refusal(lambda: model(**batch, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))),
        "after": refusal(lambda: model(**batch)),
    }
    model.eval()
    found["cache"] = refusal(lambda: model(input_ids=batch["input_ids"], use_cache=True))
    ids = whole["input_ids"]
    found["generate"] = refusal(lambda: model.generate(ids, max_new_tokens=2, do_sample=False))
    restore(model)
    return found


def test_refusals(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(_refused)):
        assert "position_ids (2, 32): expected this rank's slice, 8 tokens in dim 1" in found["whole positions"]
        assert ("labels (2, 32)" if rank == 0 else "the slices of rank 0 do not fit") in found["on one rank"]
        assert "differ in arguments" in found["arguments"]
        assert "differ in batch size (1, 2, 3, 4)" in found["batch size"]
        assert "over all 32 keys, [B, 1, 8, 32]" in found["own keys"]
        assert "Expected use_cache=False" in found["cache"]
        assert found["after"] == found["generate"] == "no error"


def _bypassed() -> float:
    """With `disable_in_eval` every rank evaluates a whole batch of its own."""
    model = make_model("llama").eval()
    batch = make_batch(2, 30 + dist.get_rank(), seed=dist.get_rank())
    expected = copy.deepcopy(model)(**batch).loss
    transform(model, 4, inputs="sharded", disable_in_eval=True)
    found = model(**batch).loss
    restore(model)
    return relative_error(found, expected)


def test_a_bypassed_evaluation_takes_whole_batches(ranks: RankPool) -> None:
    assert ranks.run(_bypassed) == [0.0] * 4


def test_runs() -> None:
    assert run_lengths(10, 4) == (2, 3, 2, 3)
    assert run_lengths(3, 4) == (0, 1, 1, 1)
    assert [overlap((4, 4), 0, (3, 5), other) for other in range(2)] == [3, 1]
    assert [overlap((4, 4), 1, (3, 5), other) for other in range(2)] == [0, 4]


def _compiled() -> tuple[float, int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model("llama")
    reference = copy.deepcopy(model)
    transform(model, 2, inputs="sharded")
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    errors = []
    for length in (32, 48, 64):
        batch = make_batch(2, length)
        found: Tensor = compiled(**cut(batch, run_lengths(length, 2))).loss
        errors.append(relative_error(found, reference(**batch).loss))
    restore(model)
    return max(errors), sum(torch._dynamo.utils.counters["graph_break"].values())


def test_compiled(pair: RankPool) -> None:
    for error, num_breaks in pair.run(_compiled):
        assert error <= 1e-5
        assert num_breaks == 0
