"""Every attention implementation is called for real, on this rank's heads: as exact as the unsharded model with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention

from passes import lower_attention
from surgery import CaptureError, restore, transform
from surgery.attention.implementations import sdpa, written_out
from surgery.verify.comparison import compare
from surgery.verify.ranks import RankPool
from tests.backends import assert_flash, prove_flash, prove_own, register_own, registries, soft_attention
from tests.batches import padded
from tests.flash import flash_on_cpu, use
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.zoo import make_batch, make_model

LENGTHS = (5, 20, 7)
ENDS = torch.tensor([0, 5, 25, 32], dtype=torch.int32)


def packed() -> dict[str, Any]:
    """One row of documents, told apart by positions that start again."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {**make_batch(1, 32), "position_ids": positions}


def with_ends() -> dict[str, Any]:
    """One row of documents, told apart by where they end."""
    ends = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    return {**make_batch(1, 32), **ends}


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: make_batch(2, 32),
    "right": lambda: padded("right"),
    "left": lambda: padded("left"),
    "ones": lambda: {**make_batch(2, 32), "attention_mask": torch.ones(2, 32, dtype=torch.long)},
    "packed": packed,
    "ends": with_ends,
}


# flash-attn


@pytest.mark.parametrize("kind", BATCHES)
def test_flash(pair: RankPool, kind: str) -> None:
    results = pair.run(prove_flash, "llama", 2, "flash_attention_2", BATCHES[kind]())
    assert_flash(results, "dense" if kind in ("causal", "ones") else "varlen")


@pytest.mark.parametrize("version", ["flash_attention_3", "flash_attention_4"])
def test_later_versions_of_flash(pair: RankPool, version: str) -> None:
    assert_flash(pair.run(prove_flash, "llama", 2, version, packed()), "varlen")


def test_flash_with_fewer_key_heads_than_ranks(ranks: RankPool) -> None:
    assert_flash(ranks.run(prove_flash, "llama", 4, "flash_attention_2", packed(), num_key_value_heads=2), "varlen")


BEYOND = [("mistral", "window"), ("gemma2", "softcap"), ("gpt_oss", "sinks")]


@pytest.mark.parametrize(("name", "what"), sampled(BEYOND, {("gemma2", "softcap"), ("gpt_oss", "sinks")}))
def test_flash_beyond_plain_attention(ranks: RankPool, name: str, what: str) -> None:
    changes = {"num_hidden_layers": 1}
    assert_flash(ranks.run(prove_flash, name, 4, "flash_attention_4", make_batch(2, 32), **changes), "dense")


# functions of a user's own


@pytest.mark.parametrize("implementation", ["soft", "soft_masked", "eager"])
def test_own_function_on_packed_documents(pair: RankPool, implementation: str) -> None:
    assert_exact(pair.run(prove_own, implementation, 2, packed()))


def test_own_function_with_a_mask_on_padding(ranks: RankPool) -> None:
    assert_exact(ranks.run(prove_own, "soft_masked", 4, padded("both"), num_key_value_heads=2))


def test_own_function_on_one_document(ranks: RankPool) -> None:
    assert_exact(ranks.run(prove_own, "soft", 4, make_batch(2, 32), num_key_value_heads=1))


class Branching(LlamaAttention):
    """Does something of its own where the implementation has a certain name."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_soft = self.config._attn_implementation == "soft"
        return super().forward(hidden_states.flip(-1) if is_soft else hidden_states, *args, **kwargs)


def _prove_branch(implementation: str) -> dict[str, float]:
    register_own()
    model = make_model("llama", attn_implementation=implementation)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Branching
    return compare(model, 2, packed())


def test_models_that_branch_on_the_name(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_branch, "soft"))


def _prove_side_by_side() -> list[dict[str, float]]:
    """One model on flash-attn, one on a function of a user's own, one left alone, in one process."""
    register_own()
    with flash_on_cpu():
        flash, own = use(make_model("llama"), "flash_attention_2"), make_model("qwen2", attn_implementation="soft")
        other = transform(make_model("llama", attn_implementation="eager"), 2)
        errors = [compare(flash, 2, packed()), compare(own, 2, packed())]
        restore(other)
    return errors


def test_implementations_side_by_side(pair: RankPool) -> None:
    for flash, own in pair.run(_prove_side_by_side):
        assert_exact([flash, own])


class Failing(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("does not trace")


def test_a_failed_capture_leaves_the_registries_alone() -> None:
    register_own()
    model = make_model("llama", attn_implementation="soft_masked")
    model.model.layers[0].self_attn.__class__ = Failing
    before = registries()
    with pytest.raises(CaptureError, match="does not trace"):
        transform(model, 2)
    assert registries() == before


def test_a_replaced_function_is_captured_anew() -> None:
    register_own()
    model = transform(make_model("llama", attn_implementation="soft"), 2)
    batch = make_batch(2, 32)
    first = model.surgery.prepare(**batch)
    assert model.surgery.prepare(**batch) is first
    AttentionInterface.register("soft", partial(soft_attention))
    assert model.surgery.prepare(**batch) is not first


# flex: forward only, as it has no backward on a CPU


def _prove_flex(implementation: str, sp_size: int, batches: list[dict[str, Any]], **changes: Any) -> dict[str, float]:
    register_own()
    model = use(make_model("mistral", sliding_window=8, **changes).eval(), implementation)
    errors = {}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for index, batch in enumerate(batches):
            del batch["labels"]
            errors[f"batch {index}"] = compare(model, sp_size, batch)["logits"]
    return errors


def test_flex(pair: RankPool) -> None:
    assert_exact(pair.run(_prove_flex, "flex_attention", 2, [make_batch(2, 32), padded("left"), packed()]))


def test_flex_heads_are_those_of_the_model(ranks: RankPool) -> None:
    assert_exact(ranks.run(_prove_flex, "sloped_flex", 4, [make_batch(2, 32)], num_key_value_heads=2))


def test_block_masks_are_made_once_for_all_calls() -> None:
    model = transform(use(make_model("llama", num_hidden_layers=2).eval(), "flex_attention"), 2)
    program = model.surgery.programs[0]
    masks = {site.node.args[3] for site in program.context.sites}
    assert [site.implementation for site in program.context.sites] == ["flex_attention"] * 2
    assert [mask.target.__name__ for mask in masks] == ["make_mask"]


def test_block_masks_of_the_caller_are_refused() -> None:
    model = transform(use(make_model("llama").eval(), "flex_attention"), 2)
    mask = create_block_mask(lambda b, h, q, k: k <= q, 2, None, 32, 32, device="cpu")
    with pytest.raises(CaptureError, match=r"the mask of LlamaAttention is a BlockMask.*Expected a tensor"):
        model.surgery.prepare(input_ids=make_batch(2, 32)["input_ids"], attention_mask=mask)


# cu_seq_lens_* where attention does not read them


def _prove_ends(implementation: str) -> dict[str, float]:
    """Against the unsharded model with a mask [1, 1, S, S] of the documents."""
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (documents[:, None] == documents[None]).tril()[None, None]
    mask = seen if implementation == "sdpa" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    model = make_model("llama", attn_implementation=implementation)
    return compare(model, 2, {**make_batch(1, 32), "attention_mask": mask}, run=lambda **_: model(**with_ends()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_ends_of_documents_become_a_mask(pair: RankPool, implementation: str) -> None:
    assert_exact(pair.run(_prove_ends, implementation))


def test_other_counts_of_documents_are_not_captured_again() -> None:
    model = transform(make_model("llama"), 2)
    first = model.surgery.prepare(**with_ends())
    ends = {"cu_seq_lens_q": torch.tensor([0, 9, 32]), "cu_seq_lens_k": torch.tensor([0, 9, 32])}
    ends = {name: value.int() for name, value in ends.items()}
    assert model.surgery.prepare(**{**with_ends(), **ends, "max_length_q": 23, "max_length_k": 23}) is first


# torch.compile(fullgraph=True)


def _prove_compiled(implementation: str, batch: dict[str, Any]) -> dict[str, float]:
    register_own()
    torch._dynamo.reset()
    model = use(make_model("llama"), implementation)
    with torch.set_grad_enabled("labels" in batch):
        run: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        return compare(model, 2, batch, run=lambda **given: run(**given))


@pytest.mark.parametrize("implementation", ["eager", "soft_masked"])
def test_compiled(pair: RankPool, implementation: str) -> None:
    assert_exact(pair.run(_prove_compiled, implementation, packed()))


@pytest.mark.parametrize("implementation", sampled(["flex_attention", "sloped_flex"], []))
def test_compiled_flex(pair: RankPool, implementation: str) -> None:
    assert_exact(pair.run(_prove_compiled, implementation, {"input_ids": make_batch(2, 32)["input_ids"]}))


@pytest.mark.parametrize("is_refused", [True, False])
def test_soft_caps_under_sdpa_are_left_out_where_transformers_leaves_them_out(is_refused: bool) -> None:
    with mock.patch.object(lower_attention, "sdpa_refuses_soft_caps", return_value=is_refused):
        model = transform(use(make_model("gemma2"), "sdpa"), 2)
    targets = {site.node.target for site in model.surgery.programs[0].context.sites}
    assert targets == {written_out if is_refused else sdpa}
