"""Sizes that one architecture alone has, that must fit each other, or that its defaults lack; by model type."""

from __future__ import annotations

from typing import Any

MIXED = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
CONVOLVED = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
STARTED = {"decoder_start_token_id": 0}

ODDITIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": "auto"},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "hc_sinkhorn_iters": 3,
        "index_n_heads": 4,
        "index_topk": 4,
    },
    "dbrx_attention": {"rope_theta": 10000.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "encoder-decoder": {**STARTED, "pad_token_id": 0},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {**MIXED, "mamba_d_head": "auto"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": CONVOLVED,
    "lfm2_moe": CONVOLVED,
    "longcat_flash": {"qk_head_dim": 24, "head_dim": 8},
    "longt5": {**STARTED, "local_radius": 7, "global_block_size": 4},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "pegasus_x": {"block_size": 16},
    "perceiver": {
        "max_position_embeddings": 32,
        "num_latents": 8,
        "d_latents": 64,
        "num_self_attends_per_block": 2,
        "qk_channels": 64,
        "v_channels": 64,
    },
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "switch_transformers": STARTED,
    "t5": STARTED,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 32,
        "mamba_expand": 2,
    },
    "xmod": {"default_language": "en_XX"},
}
