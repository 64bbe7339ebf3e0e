"""Every text architecture of the installed transformers, with a configuration to start from.

AutoModelForCausalLM    LlamaForCausalLM, MambaForCausalLM, ...     one entry a class, under its first model type
...ForSeq2SeqLM         T5ForConditionalGeneration, ...
...ForMaskedLM          BertForMaskedLM, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from surgery.errors import ConfigurationError

MAPPINGS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Architecture:
    """A model class, the task whose mapping it is in, and the model type it is listed under."""

    task: str
    class_name: str
    model_type: str

    def default_config(self) -> PreTrainedConfig:
        """The class's own defaults; a decoder where the architecture can be either and the task asks for one."""
        config = STARTS.get(self.model_type, self.model_class().config_class)()
        return self.as_decoder(config)

    def as_decoder(self, config: PreTrainedConfig) -> PreTrainedConfig:
        if self.task == "causal-lm" and getattr(config, "is_decoder", None) is False:
            config.is_decoder = True
        return config

    def model_class(self) -> Any:
        return getattr(transformers, self.class_name)

    def make(self, config: PreTrainedConfig) -> nn.Module:
        model: nn.Module = self.model_class()._from_config(config)
        return model


def list_architectures() -> list[Architecture]:
    """All of them, by task and class; a class that serves several tasks once."""
    found: dict[str, Architecture] = {}
    for task, model_type, name in _entries():
        known = found.setdefault(name, Architecture(task, name, model_type))
        if known.task == task and not _is_named_after(known) and _is_named_after(Architecture(task, name, model_type)):
            found[name] = Architecture(task, name, model_type)
    return list(found.values())


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """The architecture that a configuration names, or else the one of its model type that has all its parts.

        bart, is_encoder_decoder      ->  BartForConditionalGeneration, not its decoder alone
        bert, is_decoder False        ->  BertForMaskedLM
        bert, is_decoder True; llama  ->  BertLMHeadModel; LlamaForCausalLM

    Raises `ConfigurationError` where it is no language model's.
    """
    named = list(getattr(config, "architectures", None) or [])
    entries = [Architecture(task, name, kind) for task, kind, name in _entries() if kind == config.model_type]
    ranked = sorted(entries, key=lambda entry: (entry.class_name not in named, entry.task != _natural_task(config)))
    if not ranked:
        raise ConfigurationError(
            f"expected a causal, sequence-to-sequence or masked language model, found {type(config).__name__}."
        )
    return ranked[0]


def _natural_task(config: PreTrainedConfig) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    return "masked-lm" if getattr(config, "is_decoder", None) is False else "causal-lm"


def _is_named_after(architecture: Architecture) -> bool:
    """Whether the class bears its model type's name, as LlamaForCausalLM does under llama and not under internlm3."""
    return architecture.class_name.lower().startswith(re.sub("[-_]|text$", "", architecture.model_type))


def _entries() -> Iterator[tuple[str, str, str]]:
    for task, mapping in MAPPINGS.items():
        for model_type, names in mapping.items():
            for name in names if isinstance(names, tuple) else (names,):
                yield task, model_type, name


def _two_berts() -> PreTrainedConfig:
    encoder, decoder = transformers.BertConfig(), transformers.BertConfig(is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def _dbrx() -> PreTrainedConfig:
    return transformers.DbrxConfig(attn_config={"rope_theta": 10000.0, "clip_qkv": 8.0})


STARTS: dict[str, Any] = {"dbrx": _dbrx, "encoder-decoder": _two_berts}
"""Where a class has no defaults."""
