"""Shrunk configurations: small, of the same architecture, and true to what matters for sequence parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.verify.layer_kinds import kept_layers
from surgery.verify.shrink import shrink, small_integer

LLAMA_70B = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80}


def test_keeps_the_ratio_of_heads_and_makes_the_rest_small() -> None:
    config = AutoConfig.for_model(
        "llama", **LLAMA_70B, intermediate_size=28672, vocab_size=128256, attention_dropout=0.1
    )
    small: Any = shrink(config, sp_size=2)
    assert small.num_attention_heads == 8 * small.num_key_value_heads
    assert small.num_attention_heads * small.head_dim == small.hidden_size <= 256
    assert (small.num_hidden_layers, small.attention_dropout, small.use_cache) == (2, 0.0, False)
    assert small.vocab_size <= 128 > small.intermediate_size
    assert config.num_hidden_layers == 80


@pytest.mark.parametrize("sp_size", [2, 3, 4, 8])
@pytest.mark.parametrize("heads", [(32, 8), (12, 12), (14, 2), (25, 5), (64, 1), (71, 71)])
def test_keeps_how_heads_divide(heads: tuple[int, int], sp_size: int) -> None:
    query, key = heads
    config = AutoConfig.for_model("llama", hidden_size=64 * query, num_attention_heads=query, num_key_value_heads=key)
    small: Any = shrink(config, sp_size)
    assert (small.num_attention_heads % sp_size == 0) == (query % sp_size == 0)
    assert (small.num_key_value_heads % sp_size == 0) == (key % sp_size == 0)


def test_keeps_one_layer_of_each_kind() -> None:
    config = AutoConfig.for_model("qwen3_next")
    small: Any = shrink(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) == 2


def test_keeps_one_layer_of_each_kind_where_their_number_is_that_of_a_list() -> None:
    kinds = ["linear_attention", "moe"] * 10 + ["full_attention"]
    small: Any = shrink(AutoConfig.for_model("nemotron_h", layers_block_type=kinds))
    assert small.layers_block_type == ["linear_attention", "moe", "full_attention"]


def test_kinds_are_told_apart_by_all_lists_at_once() -> None:
    values = {"layer_types": ["a", "b", "a", "b"], "mlp_layer_types": ["x", "x", "x", "y"], "moe_layers": [2, 3]}
    assert kept_layers(values, 4) == [0, 1, 2, 3]
    assert kept_layers({"layer_types": ["a", "a", "b"]}, 3) == [0, 2]
    assert kept_layers({}, 80) == [0, 1]


def test_parts_are_shrunk_alike() -> None:
    small: Any = shrink(AutoConfig.for_model("gemma3"))
    assert small.text_config.hidden_size == small.vision_config.hidden_size
    assert len({small.boi_token_index, small.eoi_token_index, small.image_token_index}) == 3


def test_a_field_that_no_row_knows_stays() -> None:
    assert small_integer("num_channels", 3, None) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "deepseek_v3", "bamba", "gpt_neo", "phi3"])
def test_shrunk_models_run(name: str) -> None:
    model: Any = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    ids = torch.randint(20, 90, (2, 16))
    assert model(input_ids=ids, labels=ids).loss.isfinite()
