"""`register_with_transformers`: a script written for DeepSpeed's Ulysses, with one import changed, on gloo ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # the recipe's differentiable all-gather
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from surgery import restore
from surgery.ulysses import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter, forget
from surgery.verify.comparison import SMALLEST_SHARE, gradients_of, relative_error
from surgery.verify.ranks import RankPool
from tests.proof import assert_exact
from tests.refusals import refusal
from tests.zoo import make_batch, make_model

register = UlyssesSPAttentionHF.register_with_transformers


def documented_loss(model: Any, batch: dict[str, Tensor], mpu: Any) -> Tensor:
    """The loss as DeepSpeed's documentation computes it, word for word."""
    sp_group, sp_world_size = mpu.get_sequence_parallel_group(), mpu.get_sequence_parallel_world_size()
    outputs = model(**batch)
    shift_labels = batch["shift_labels"]
    loss = model.loss_function(
        logits=outputs.logits,
        labels=None,
        shift_labels=shift_labels,
        vocab_size=model.config.vocab_size,
    )
    losses_per_rank = torch.distributed.nn.functional.all_gather(loss, group=sp_group)
    good_tokens = (shift_labels != -100).view(-1).sum()
    good_tokens_per_rank = torch.distributed.nn.functional.all_gather(good_tokens, group=sp_group)
    total_loss = sum(losses_per_rank[rank] * good_tokens_per_rank[rank] for rank in range(sp_world_size))
    total_good_tokens = sum(good_tokens_per_rank)
    return total_loss / max(total_good_tokens, 1)


def own_loss(model: Any, batch: dict[str, Tensor], mpu: Any) -> Tensor:
    """The model's own loss, taken through the same recipe: every rank holds the whole loss already."""
    sp_group, sp_world_size = mpu.get_sequence_parallel_group(), mpu.get_sequence_parallel_world_size()
    shift_labels = batch["shift_labels"]
    loss = model(**batch, labels=shift_labels).loss
    losses_per_rank = torch.distributed.nn.functional.all_gather(loss, group=sp_group)
    good_tokens_per_rank = torch.distributed.nn.functional.all_gather((shift_labels != -100).sum(), group=sp_group)
    total_loss = sum(losses_per_rank[rank] * good_tokens_per_rank[rank] for rank in range(sp_world_size))
    return total_loss / sum(good_tokens_per_rank)


def plain_loss(model: Any, batch: dict[str, Tensor], mpu: Any) -> Tensor:
    return model(**batch, labels=batch["shift_labels"]).loss


LOSSES = {"documented": documented_loss, "own": own_loss, "plain": plain_loss}


def _batch(kind: str, batch_size: int, seed: int) -> dict[str, Tensor]:
    """A rank's own sample; in "no labels in a shard" the first quarter of the tokens has none."""
    batch = make_batch(batch_size, 32, seed=seed)
    positions = torch.arange(32).expand(batch_size, -1)
    if kind == "packed":
        positions = torch.cat([torch.arange(11), torch.arange(21)]).expand(batch_size, -1)
    if kind == "no labels in a shard":
        batch["labels"][:, :9] = -100
    if kind == "padded":
        mask = torch.ones_like(positions)
        mask[0, :10] = 0
        batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    return {**batch, "position_ids": positions}


def _prove_script(
    name: str, kind: str, sp_size: int, losses: tuple[str, ...] = ("documented",), batch_size: int = 1, **changes: Any
) -> dict[str, float]:
    """Losses and accumulated gradients of a script over the samples of all ranks of a group."""
    reference = make_model(name, **changes)
    model = copy.deepcopy(reference)
    mpu = register(model, "sdpa", sequence_parallel_size=sp_size, micro_batch_size=batch_size)
    group = mpu.get_sequence_parallel_group()
    members = dist.get_process_group_ranks(group)
    errors = {}
    for loss in losses:
        reference.zero_grad()
        model.zero_grad()
        loader = UlyssesSPDataLoaderAdapter(
            [_batch(kind, batch_size, seed=dist.get_rank())],
            sp_rank=mpu.get_sequence_parallel_rank(),
            sp_group=group,
            sp_world_size=mpu.get_sequence_parallel_world_size(),
            device="cpu",
        )
        for member, batch in zip(members, loader, strict=True):
            found = LOSSES[loss](model, batch, mpu)
            found.backward()
            expected = reference(**_batch(kind, batch_size, seed=member), use_cache=False).loss
            expected.backward()
            errors[f"{loss}: loss {member}"] = relative_error(found, expected)
        whole = gradients_of(reference)
        floor = SMALLEST_SHARE * max(float(gradient.abs().max()) for gradient in whole.values())
        for parameter, gradient in gradients_of(model, group).items():
            errors[f"{loss}: {parameter}"] = relative_error(gradient, whole[parameter], floor)
    restore(model)
    return errors


def test_the_loss_recipe(ranks: RankPool) -> None:
    """The gradient is not multiplied by P, whichever way the loop takes, and a shard without labels counts for 0."""
    assert_exact(ranks.run(_prove_script, "llama", "no labels in a shard", 4, tuple(LOSSES)))


@pytest.mark.parametrize(
    ("name", "kind", "batch_size", "changes"),
    [
        ("llama", "packed", 2, {"num_key_value_heads": 1}),
        ("llama", "padded", 2, {}),
        ("mistral", "plain", 1, {}),
        ("gpt2", "plain", 3, {}),
    ],
)
def test_scripts(pair: RankPool, name: str, kind: str, batch_size: int, changes: dict[str, Any]) -> None:
    assert_exact(pair.run(_prove_script, name, kind, 2, batch_size=batch_size, **changes))


def test_on_a_grid(ranks: RankPool) -> None:
    """Without the recipe: torch's differentiable all-gather has no backward on gloo groups smaller than the world."""
    assert_exact(ranks.run(_prove_script, "llama", "packed", 2, ("plain",), batch_size=2))


@contextmanager
def _saved(directory: str) -> Iterator[str]:
    if dist.get_rank() == 0:
        make_model("llama").save_pretrained(directory)
    dist.barrier()
    yield directory
    forget(directory)


def _load_by_name(directory: str) -> dict[str, Any]:
    original = PreTrainedModel.__dict__["from_pretrained"]
    with _saved(directory):
        before = AutoModelForCausalLM.from_pretrained(directory)
        mpu = register(directory, "sdpa", 2, 1)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            f"{directory}/../{directory.rsplit('/', 1)[-1]}", output_loading_info=True
        )
        model, info = loaded
        other = make_model("llama")
        batch = _batch("packed", 2, seed=0)
        runs = slice(16 * dist.get_rank(), 16 * dist.get_rank() + 16)
        expected = before.train()(**batch, use_cache=False).loss
        found = model.train()(**{name: tensor[:, runs] for name, tensor in batch.items()}).loss
        facts = {
            "size": mpu.get_sequence_parallel_world_size(),
            "same groups": model.surgery.mpu.get_sequence_parallel_group() is mpu.get_sequence_parallel_group(),
            "error": relative_error(found, expected),
            "missing": list(info["missing_keys"]),
            "others": [hasattr(untouched, "surgery") for untouched in (before, other)],
            "eager": refusal(lambda: AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")),
        }
        restore(model)
        again = AutoModelForCausalLM.from_pretrained(directory)
        facts["again"] = hasattr(again, "surgery")
    facts["forgotten"] = hasattr(AutoModelForCausalLM.from_pretrained(directory), "surgery")
    facts["undone"] = PreTrainedModel.__dict__["from_pretrained"] is original
    mpu.close()
    return facts


def test_models_loaded_by_a_registered_name(pair: RankPool, tmp_path: Any) -> None:
    for facts in pair.run(_load_by_name, str(tmp_path / "model")):
        assert facts["size"] == 2
        assert facts["same groups"] and facts["again"] and facts["undone"]
        assert facts["error"] <= 1e-5
        assert facts["missing"] == []
        assert facts["others"] == [False, False]
        assert "expected LlamaForCausalLM to run 'sdpa', the registered core_attn_implementation" in facts["eager"]
        assert not facts["forgotten"]


def _bad_registrations() -> dict[str, Any]:
    model = make_model("llama")
    found = {
        "attention": refusal(lambda: register(model, "sdpb", 4, 1)),
        "other attention": refusal(lambda: register(model, "eager", 4, 1)),
        "size": refusal(lambda: register(model, "sdpa", 3, 1)),
        "zero": refusal(lambda: register(model, "sdpa", 0, 1)),
        "batch": refusal(lambda: register(model, "sdpa", 4, 0)),
        "name": refusal(lambda: register("no-such-model/anywhere", "sdpa", 4, 1)),
        "length": refusal(lambda: register(model, "sdpa", 4, 1, seq_length_is_variable=False)),
        "one": register(model, "sdpa", 1, 1),
        "untouched": "surgery" not in model.__dict__,
        "then": refusal(lambda: register(model, "sdpa", 4, 1, seq_length=32, seq_length_is_variable=False)),
        "fixed": refusal(lambda: model(**{n: x[:, :5] for n, x in make_batch(2, 32).items()})),
        "classifier": refusal(lambda: register(_classifier(), "sdpa", 4, 1)),
    }
    restore(model)
    return found


def _classifier() -> Any:
    return AutoModelForSequenceClassification.from_config(make_model("llama").config)


@pytest.mark.usefixtures("fake_ranks")
def test_bad_registrations() -> None:
    found = _bad_registrations()
    assert "expected core_attn_implementation to be one of eager, " in found["attention"]
    assert "found 'sdpb'" in found["attention"]
    assert "to run 'eager'" in found["other attention"]
    assert "sp_size 3 does not divide the world of 4 ranks" in found["size"]
    assert "positive integer, found 0" in found["zero"]
    assert "micro_batch_size to be a positive integer" in found["batch"]
    assert "hub name or a local path" in found["name"]
    assert "needs a length" in found["length"]
    assert found["one"] is None
    assert found["untouched"]
    assert found["then"] == "no error"
    assert "expected sequences of 32 tokens" in found["fixed"]


def test_without_ranks() -> None:
    assert "torchrun --nproc-per-node 4" in refusal(lambda: register(make_model("llama"), "sdpa", 4, 1))


def _three_models() -> list[float]:
    """Two registered models of different sizes and one untouched, side by side."""
    models = [make_model(name) for name in ("llama", "qwen2", "llama")]
    references = [copy.deepcopy(model) for model in models]
    for model, size in zip(models[:2], (2, 4), strict=True):
        register(model, "sdpa", size, 1)
    errors = []
    for model, reference, size in zip(models, references, (2, 4, 1), strict=True):
        batch = _batch("packed", 2, seed=0)
        own = 32 // size * (dist.get_rank() % size)
        slices = {name: tensor[:, own : own + 32 // size] for name, tensor in batch.items()}
        found = model(**slices, use_cache=False).loss
        errors.append(relative_error(found, reference(**batch, use_cache=False).loss))
    for model in models[:2]:
        restore(model)
    return errors


def test_two_sizes_and_an_untouched_model(ranks: RankPool) -> None:
    for errors in ranks.run(_three_models):
        assert max(errors[:2]) <= 1e-5
        assert errors[2] == 0.0


def _loss_function_is_given_back() -> list[bool]:
    model = make_model("llama")
    register(model, "sdpa", 2, 1)
    changed = "_loss_function" in model.__dict__
    restore(model)
    return [changed, "_loss_function" in model.__dict__]


def test_restore_gives_the_loss_function_back(pair: RankPool) -> None:
    assert pair.run(_loss_function_is_given_back) == [[True, False]] * 2
