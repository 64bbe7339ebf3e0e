"""Tiny models of many architectures, from configs with fixed seeds: 8 query heads, 4 key/value heads if any.

They have one layer, or as many as the pattern of their layers: a trace takes as long as a model is deep.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask

from surgery.inputs.signature import CACHES

CACHE = next(name for name in CACHES[::-1] if name in inspect.signature(create_causal_mask).parameters)
"""What the installed transformers calls the argument."""
VOCAB_SIZE = 99
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = dict.fromkeys(
    (
        "attention_dropout",
        "attn_pdrop",
        "dropout",
        "embd_pdrop",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "activation_dropout",
        "classifier_dropout",
        "embed_dropout",
        "emb_dropout_prob",
        "hidden_dropout",
        "residual_dropout",
        "resid_pdrop",
        "dropout_rate",
        "attention_probs_dropout",
        "embedding_dropout",
        "mlp_dropout",
        "pooler_dropout",
        "summary_last_dropout",
    ),
    0.0,
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma": {"head_dim": 16},
    "gemma3_text": {
        "num_hidden_layers": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {},
    "phi3": {"original_max_position_embeddings": 512},
    "gpt2": {"n_embd": 64, "n_head": 8, "n_layer": 1, "n_positions": 512},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 0},
    "olmo2": {},
    "glm4": {"head_dim": 16},
    "cohere": {},
    "granite": {},
    "starcoder2": {"sliding_window": None},
    "smollm3": {},
    "nemotron": {"head_dim": 8},
    "stablelm": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"num_hidden_layers": 2, "head_dim": 16, "sliding_window": 8},
    "gpt_oss": {
        "num_hidden_layers": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "bloom": {"n_head": 8, "n_layer": 1},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gptj": {"n_embd": 64, "n_head": 8, "n_layer": 1, "n_positions": 512, "rotary_dim": 4},
    "gpt_neo": {
        "num_hidden_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "num_heads": 8,
        "window_size": 8,
    },
    "bert": {"is_decoder": True, "pad_token_id": 0},
    "big_bird": {"is_decoder": True, "pad_token_id": 0},
    "jetmoe": {
        "num_key_value_heads": 4,
        "kv_channels": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
"""Soft caps, sinks, ALiBi, hand-written attention, tables of positions, an encoder's blocks, a branch on the length,
tokens counted by expert: nothing was made for them."""
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "jamba": {
        "num_hidden_layers": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "bamba": {
        "num_hidden_layers": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
    },
    "nemotron_h": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
    },
    "qwen3_next": {
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 2,
        "lru_width": 64,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 16,
        "head_dim": 8,
    },
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 64, "context_length": 512},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}
"""State-space models, linear attention, convolutions, and hybrids of them with attention."""
ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 32, "pad_token_id": 0},
    "bert": {"pad_token_id": 0, "is_decoder": False},
    "deberta-v2": {
        "pad_token_id": 0,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
    },
    "electra": {"embedding_size": 32, "pad_token_id": 0},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "roberta": {"pad_token_id": 1},
}
_DECODER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
_T5 = {
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 96,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 8,
    "pad_token_id": 0,
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": _DECODER,
    "mbart": _DECODER,
    "pegasus": _DECODER,
    "switch_transformers": {**_T5, "num_experts": 4, "decoder_start_token_id": 0},
    "t5": {**_T5, "pad_token_id": 0, "decoder_start_token_id": 0},
    "whisper": {**_DECODER, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
}


def make_config(name: str, **changes: Any) -> Any:
    """The shrunk configuration of an architecture, without dropout."""
    own = (ARCHITECTURES | OTHERS | RECURRENT).get(name, {})
    return AutoConfig.for_model(name, **{**COMMON, **NO_DROPOUT, **own, **changes})


def make_model(
    name: str, *, auto: Any = AutoModelForCausalLM, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A model with random weights, also where the class would start from zeros or ones."""
    torch.manual_seed(seed)
    known = ENCODER_DECODERS | ENCODERS if auto is not AutoModelForCausalLM else {}
    model = auto.from_config(make_config(name, **{**known.get(name, {}), **changes})).to(dtype)
    if dtype == torch.float64 and hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # torch's grouped_mm has no float64 kernel
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def make_batch(batch_size: int, length: int, *, seed: int = 1, vocab_size: int = VOCAB_SIZE) -> dict[str, torch.Tensor]:
    """Ids, and labels ignored unevenly: a third of the tokens, and the whole second half of the first sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (batch_size, length), generator=generator)
    ignored = torch.rand(ids.shape, generator=generator) < 0.3
    ignored[0, length // 2 :] = True
    return {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}
