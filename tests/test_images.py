"""Vision-language models: the text tower sharded, the vision tower whole on every rank, images among the tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from surgery import restore, transform
from surgery.errors import CaptureError, InputError
from surgery.verify.comparison import (
    SMALLEST_SHARE,
    float_is_double,
    gradients_of,
    relative_error,
    run_sharded,
    run_whole,
)
from surgery.verify.ranks import RankPool
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import COMMON

B, S, IMAGE, IMAGE_SIZE = 2, 46, 90, 16
TEXT = {**COMMON, "head_dim": 8, "pad_token_id": 0}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "projection_dim": 64,
}
GRIDS = {"num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN = {"text_config": {**TEXT, **SECTIONS}, "image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "qwen2_vl": {**QWEN, "vision_config": {**GRIDS, "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}},
    "qwen2_5_vl": {
        **QWEN,
        "vision_config": {
            **GRIDS,
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "gemma3": {
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "num_hidden_layers": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "paligemma": {
        "text_config": {**TEXT, "model_type": "gemma"},
        "vision_config": SIGLIP,
        "image_token_index": IMAGE,
        "projection_dim": 64,
    },
    "idefics3": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": VISION,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [IMAGE_SIZE] * 2, "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
}
TOKENS_PER_IMAGE = {"llava": 16, "paligemma": 16}
DRAWN_MASKS = ("gemma3", "paligemma")
"""Their decoders are handed masks: images go into the graph, which has a place for a few of one size."""


def make_vision_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **MODELS[name])).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def make_images(name: str, count: int = B, dtype: torch.dtype = torch.float32, length: int = S) -> dict[str, Tensor]:
    """One image in each of the first `count` sequences, across the border of two shards; uneven labels."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(3, IMAGE, (B, length), generator=generator)
    is_image = torch.zeros_like(ids, dtype=torch.bool)
    is_image[:count, length // 2 - 2 : length // 2 - 2 + TOKENS_PER_IMAGE.get(name, 4)] = True
    ids[is_image] = IMAGE
    ignored = is_image | (torch.rand(ids.shape, generator=generator) < 0.3)
    ignored[0, length // 2 :] = True
    batch = {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}
    pixels = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype)
    if name.startswith("qwen"):
        patches = torch.randn(count * 16, 3 * 2 * 4 * 4, generator=generator).to(dtype)
        grids = torch.tensor([[1, 4, 4]] * count)
        return {**batch, "pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": is_image.long()}
    if name in DRAWN_MASKS:
        batch["token_type_ids"] = is_image.long()
    return {**batch, "pixel_values": pixels[:, None] if name == "idefics3" else pixels}


def prove_images(name: str, sp_size: int, dtype: torch.dtype = torch.float32) -> tuple[list[dict[str, float]], int]:
    """The errors with two images and with one, and how many graphs were captured for them."""
    model, errors = make_vision_model(name, dtype), []
    whole = copy.deepcopy(model)
    transform(model, sp_size)
    before = len(model.surgery.programs)
    for count in (B, 1) if name not in DRAWN_MASKS else (B,):
        whole.zero_grad()
        model.zero_grad()
        batch = make_images(name, count, dtype)
        reference = run_whole(whole, batch)
        reference.outputs.pop("image_hidden_states", None)  # a merged call does not return them
        errors.append(run_sharded(model, reference, batch))
    captured = len(model.surgery.programs) - before
    restore(model)
    return errors, captured


def prove_in_float64(name: str, sp_size: int) -> tuple[list[dict[str, float]], int]:
    with float_is_double():
        return prove_images(name, sp_size, torch.float64)


@pytest.mark.parametrize("name", sampled(MODELS, {"llava", "qwen2_5_vl"}))
def test_images(world: World, name: str) -> None:
    for errors, captured in world.run(prove_images, name, world.sp_size):
        assert_exact(errors)
        assert captured == 1


def test_images_in_float64(pair: RankPool) -> None:
    for errors, _ in pair.run(prove_in_float64, "qwen2_vl", 2):
        assert_exact(errors, torch.float64)


def prove_text_tower(sp_size: int) -> dict[str, float]:
    """The text tower transformed alone, in a model that is not: hidden states gathered, all else whole."""
    model, batch = make_vision_model("llava"), make_images("llava")
    reference = run_whole(copy.deepcopy(model), batch)
    labels = batch.pop("labels")
    tower = transform(model.get_decoder(), sp_size)
    logits = model.lm_head(tower.surgery.gather(model.model(**batch, use_cache=False).last_hidden_state))
    loss = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    loss.backward()
    gradients = gradients_of(model, tower.surgery.mpu.get_sequence_parallel_group())
    restore(tower)
    floor = SMALLEST_SHARE * max(float(gradient.abs().max()) for gradient in reference.gradients.values())
    errors = {name: relative_error(gradients[name], each, floor) for name, each in reference.gradients.items()}
    return {**errors, "loss": relative_error(loss, reference.outputs["loss"])}


def test_text_tower_alone(pair: RankPool) -> None:
    assert_exact(pair.run(prove_text_tower, 2))


def refused_slice() -> str:
    model = transform(make_vision_model("llava"), 2, inputs="sharded")
    try:
        model(**make_images("llava"))
    except InputError as error:
        return str(error)
    finally:
        restore(model)
    return ""


def test_images_of_slices_are_refused(pair: RankPool) -> None:
    for text in pair.run(refused_slice):
        assert "Expected whole inputs" in text


def test_a_decoder_that_is_given_images_too_is_refused() -> None:
    """qwen3_vl adds features to the hidden states of its first layers, and no trace follows its vision tower."""
    vision = {**MODELS["qwen2_5_vl"]["vision_config"], "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = AutoConfig.for_model("qwen3_vl", **{**QWEN, "vision_config": vision})
    model = transform(AutoModelForImageTextToText.from_config(config), 2)
    with pytest.raises(CaptureError, match=r"more of the images than embeddings: deepstack_visual_embeds.*get_decoder"):
        model.surgery.prepare(**make_images("qwen2_vl"))
