"""Padding, packed documents and explicit masks: exact, where the references attend to what they should not."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama

from surgery import UnsupportedOperationError, transform
from surgery.verify.comparison import compare
from surgery.verify.ranks import RankPool
from tests.batches import packed, padded
from tests.proof import assert_calls_exact, assert_exact, prove, prove_batches, prove_unchanged
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model


@pytest.mark.parametrize("name", sampled(["llama", "gpt2", "mistral", "opt"], {"llama", "mistral"}))
def test_padding(world: World, name: str) -> None:
    ones = {**make_batch(2, 32), "attention_mask": torch.ones(2, 32, dtype=torch.long)}
    batches = [padded("left"), padded("right"), padded("both"), ones]
    assert_calls_exact(world.run(prove_batches, name, world.sp_size, batches), num_programs=1)


@pytest.mark.parametrize("name", sampled(["llama", "qwen3", "gemma3_text", "mistral"], {"llama", "gemma3_text"}))
def test_packed_documents(world: World, name: str) -> None:
    batches = [packed((5, 20, 7)), packed((32,)), packed((9, 9))]
    assert_calls_exact(world.run(prove_batches, name, world.sp_size, batches), num_programs=1)


def test_a_bias_on_a_broadcast_key(world: World) -> None:
    """The last of the padding predicts the first token: gradients of a query that sees no key, by torch's formula."""
    assert_exact(world.run(prove, "falcon", world.sp_size, batch=padded("left"), alibi=True))


def test_explicit_mask(world: World) -> None:
    visible = torch.ones(32, 32, dtype=torch.bool).tril().logical_and(torch.rand(32, 32) < 0.7)
    visible = visible | torch.eye(32, dtype=torch.bool)
    batch = {**make_batch(2, 32), "attention_mask": visible.expand(2, 1, -1, -1).contiguous()}
    assert_exact(world.run(prove, "llama", world.sp_size, batch=batch))


def _fading(length: int) -> Tensor:
    """A mask [2, 8, S, S]: every head forgets at a pace of its own, as under ALiBi."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    slopes = torch.arange(1, 9).view(1, 8, 1, 1) / 16
    bias = torch.where(distance >= 0, -slopes * distance, torch.finfo(torch.float32).min)
    return bias.expand(2, -1, -1, -1).contiguous()


def test_a_mask_for_each_head(ranks: RankPool) -> None:
    """Also of as many tokens as heads."""
    batches = [{**make_batch(2, length), "attention_mask": _fading(length)} for length in (32, 8)]
    assert_calls_exact(ranks.run(prove_batches, "llama", 4, batches), num_programs=1)


def _chunked(config: Any, inputs_embeds: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    config.attention_chunk_size = 6
    return masking_utils.create_chunked_causal_mask(config, inputs_embeds, attention_mask, **kwargs)


def _blockwise(config: Any, inputs_embeds: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """The first tokens of a row, or of each document, are an image: all of them see each other."""
    image = torch.where(kwargs["position_ids"] < 4, 0, -1).expand(inputs_embeds.shape[0], -1)
    return create_causal_mask(config, inputs_embeds, attention_mask, block_sequence_ids=image, **kwargs)


def _prefix(config: Any, inputs_embeds: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """A prefix that all tokens of a row see, by a function of the model's own over a tensor of its own."""
    prefix = (kwargs["position_ids"] < 4).sum(-1).expand(inputs_embeds.shape[0])

    def is_in_prefix(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < prefix[batch]

    return create_causal_mask(config, inputs_embeds, attention_mask, or_mask_function=is_in_prefix, **kwargs)


def _bidirectional(config: Any, inputs_embeds: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    return masking_utils.create_bidirectional_mask(config, inputs_embeds, attention_mask)


def _of_eager(config: Any, inputs_embeds: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """A mask of another implementation than the model's attention is of."""
    other = copy.deepcopy(config)
    other._attn_implementation = "eager"
    return create_causal_mask(other, inputs_embeds, attention_mask, **kwargs)


MASKS = {
    "chunked": _chunked,
    "blockwise": _blockwise,
    "prefix": _prefix,
    "bidirectional": _bidirectional,
    "of-eager": _of_eager,
}


def _prove_mask(kind: str, implementation: str, batch: dict[str, Any]) -> dict[str, float]:
    """The errors of a llama that asks for another mask."""
    model = make_model("llama", attn_implementation=implementation)
    for layer in model.model.layers:
        layer.self_attn.is_causal = kind != "bidirectional"
    with mock.patch.object(modeling_llama, "create_causal_mask", MASKS[kind]):
        return compare(model, 2, batch)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    sampled(
        [(k, i) for k in MASKS for i in ("sdpa", "eager")], {("blockwise", "eager"), *((k, "sdpa") for k in MASKS)}
    ),
)
def test_masks_of_other_models(pair: RankPool, kind: str, implementation: str) -> None:
    batch = packed((5, 20, 7)) if implementation == "sdpa" else padded("left")
    assert_exact(pair.run(_prove_mask, kind, implementation, batch))


def test_eager_implementation(ranks: RankPool) -> None:
    assert_exact(ranks.run(prove, "llama", 4, batch=padded("right"), attn_implementation="eager"))


class Computing(modeling_llama.LlamaAttention):
    """Hides the key before every hidden one, where it is given a mask."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        if mask is not None:
            kwargs["attention_mask"] = mask & mask.roll(1, -1) | torch.ones_like(mask).tril().triu()
        return super().forward(hidden_states, *args, **kwargs)


class Asking(modeling_llama.LlamaAttention):
    """Does something else where it is given a mask, and what no trace can follow."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = torch.tensor(1.0 if kwargs["attention_mask"] is None else 0.5)
        for t in range(hidden_states.shape[1]):
            scale = scale * (1 + hidden_states[:, t].detach().sigmoid().mean() / 64)
        return super().forward(hidden_states * scale, *args, **kwargs)


def _model_with(attention: type[modeling_llama.LlamaAttention]) -> Any:
    model = make_model("llama", num_hidden_layers=2, attn_implementation="sdpa")
    model.model.layers[0].self_attn.__class__ = attention
    return model


def test_computing_with_a_mask_that_may_be_left_out_is_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"a mask of 'sdpa' that transformers leaves out"):
        transform(_model_with(Computing), 2)


def _prove_computing(sp_size: int, batch: dict[str, Any]) -> dict[str, float]:
    always = partial(create_causal_mask, allow_is_causal_skip=False)
    with mock.patch.object(modeling_llama, "create_causal_mask", always):
        return compare(_model_with(Computing), sp_size, batch)


def test_computing_with_a_mask_that_is_always_there(world: World) -> None:
    for batch in (make_batch(2, 32), packed((5, 20, 7)), padded("left")):
        assert_exact(world.run(_prove_computing, world.sp_size, batch))


def _windowed(window: int, config: Any, *args: Any, **kwargs: Any) -> Any:
    other = copy.deepcopy(config)
    other.sliding_window = window
    return masking_utils.create_sliding_window_causal_mask(other, *args, **kwargs)


ASKED = {
    "left out": create_causal_mask,
    "always there": partial(create_causal_mask, allow_is_causal_skip=False),
    "a window": partial(_windowed, 8),
    "a window beyond the end": partial(_windowed, 64),
}


def _prove_asking(sp_size: int, kind: str) -> tuple[list[dict[str, float]], int]:
    ones = {**make_batch(2, 32), "attention_mask": torch.ones(2, 32, dtype=torch.long)}
    batches = [make_batch(2, 32), packed((5, 20, 7)), packed((32,)), padded("left"), ones]
    with mock.patch.object(modeling_llama, "create_causal_mask", ASKED[kind]):
        return prove_unchanged(_model_with(Asking), sp_size, batches)


@pytest.mark.parametrize("kind", sampled(ASKED, {"left out", "a window beyond the end"}))
def test_a_module_that_is_called_whole_gets_a_mask_where_the_model_has_one(world: World, kind: str) -> None:
    assert_calls_exact(world.run(_prove_asking, world.sp_size, kind), num_programs=3)
