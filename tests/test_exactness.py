"""Loss, logits and the unscaled gradient of every parameter equal the unsharded model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery.verify.comparison import compare, gradients_of, relative_error
from surgery.verify.ranks import RankPool
from tests.proof import assert_calls_exact, assert_exact, prove, prove_batches
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import ARCHITECTURES, OTHERS, make_batch, make_model

SAMPLE = {"llama", "gemma3_text", "gpt2", "mixtral", "opt", "phi3"}


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, SAMPLE))
def test_architecture_on_two_ranks(pair: RankPool, name: str) -> None:
    assert_exact(pair.run(prove, name, 2))


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, {"llama", "mistral", "stablelm"}))
def test_architecture_on_four_ranks(ranks: RankPool, name: str) -> None:
    assert_exact(ranks.run(prove, name, 4, num_hidden_layers=2))


@pytest.mark.parametrize("name", sampled(OTHERS, {"gemma2", "bloom", "falcon", "jetmoe"}))
def test_architecture_that_nothing_was_made_for(world: World, name: str) -> None:
    assert_exact(world.run(prove, name, world.sp_size))


FLOAT32_INSIDE = {"cohere"}
"""Its norm casts to float32 by name, whatever the model's dtype: the weight's gradient is a float32 sum of tokens."""


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, {"llama", *FLOAT32_INSIDE}))
def test_double_precision(ranks: RankPool, name: str) -> None:
    results = ranks.run(prove, name, 4, dtype=torch.float64)
    assert_exact(results, torch.float32 if name in FLOAT32_INSIDE else torch.float64)


@pytest.mark.parametrize("name", sampled(["llama", "opt", "mistral", "mixtral"], {"opt", "mistral"}))
def test_eval_mode(pair: RankPool, name: str) -> None:
    assert_exact(pair.run(prove, name, 2, is_training=False))


def _without_labels(start: int, end: int) -> dict[str, Any]:
    """A batch without labels from token `start` to `end`."""
    batch = make_batch(2, 32)
    batch["labels"][:, start:end] = -100
    return batch


@pytest.mark.parametrize("name", sampled(["llama", "gpt2"], {"llama"}))
def test_batches(ranks: RankPool, name: str) -> None:
    """A shard without labels, labels in one shard only, three sequences, and one, which has a graph of its own."""
    batches = [_without_labels(8, 16), _without_labels(8, 32), make_batch(3, 32), make_batch(1, 32)]
    assert_calls_exact(ranks.run(prove_batches, name, 4, batches), num_programs=2)


def test_multi_query_heads(world: World) -> None:
    assert_exact(world.run(prove, "llama", world.sp_size, num_key_value_heads=1))


def test_tied_embeddings(world: World) -> None:
    assert_exact(world.run(prove, "llama", world.sp_size, tie_word_embeddings=True))


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_num_items_in_batch(world: World, count: Any) -> None:
    assert_exact(world.run(prove, "llama", world.sp_size, batch={**make_batch(2, 32), "num_items_in_batch": count}))


def test_without_labels(world: World) -> None:
    assert_exact(world.run(prove, "llama", world.sp_size, batch={"input_ids": make_batch(2, 32)["input_ids"]}))


def test_inputs_embeds(world: World) -> None:
    embeds = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    batch = {"inputs_embeds": embeds, "labels": make_batch(2, 32)["labels"]}
    assert_exact(world.run(prove, "llama", world.sp_size, batch=batch))


def test_shift_labels(world: World) -> None:
    batch = make_batch(2, 32)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert_exact(world.run(prove, "llama", world.sp_size, batch={**batch, "shift_labels": shifted}))


def _prove_sum_convention(sp_size: int) -> dict[str, float]:
    return compare(make_model("llama"), sp_size, make_batch(2, 32), gradients="sum", scale=sp_size)


def test_gradients_sum(ranks: RankPool) -> None:
    assert_exact(ranks.run(_prove_sum_convention, 4))


BF16_TOLERANCE = 0.06
"""bf16 keeps 8 bits: a relative step of 2**-8 = 0.004. The two models round the same sums in different orders, over
two layers forward and backward, and a gradient's largest entry is a sum of such steps. The unsharded bf16 model itself
is this far from float32, which the test checks, so that the bound is a property of the dtype and not of the
transform."""


def _prove_bfloat16() -> tuple[dict[str, float], dict[str, float]]:
    batch = make_batch(2, 32)
    exact = make_model("llama")
    rounded = make_model("llama").to(torch.bfloat16)
    sharded = compare(make_model("llama").to(torch.bfloat16), 4, batch)
    exact(**batch).loss.backward()
    rounded(**batch).loss.backward()
    expected = gradients_of(exact)
    own = {name: relative_error(g.float(), expected[name]) for name, g in gradients_of(rounded).items()}
    return sharded, own


def test_bfloat16(ranks: RankPool) -> None:
    for sharded, own in ranks.run(_prove_bfloat16):
        assert max(sharded.values()) <= BF16_TOLERANCE
        assert max(sharded.values()) <= 2 * max(own.values())
