"""Shrink a configuration: the same architecture, small enough to be run whole and sharded side by side in seconds.

    layers    32 of 3 kinds     ->  one of each kind, at least two
    heads     32 over 8, P = 2  ->  16 over 4: their ratio, and whether they divide over P, are kept
    widths    4096              ->  64 in every part, so that parts still fit each other
    experts   128, 8 a token    ->  4, 2 a token
    windows   4096              ->  8, so that they matter for a short sequence
    dropout   0.1               ->  0

What a field's name stands for is said once, in a table: the first pattern that fits decides, and a field that no row
knows stays as it is. What only a single architecture has is in `surgery/verify/oddities.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from surgery.verify.layer_kinds import fewer_layers
from surgery.verify.oddities import ODDITIES

WIDTH, HEAD_SIZE, SMALLEST_HEAD_SIZE, WINDOW = 64, 16, 8, 8
VOCAB_SIZE = 128
FIRST_SPECIAL_ID = 100  # ordinary tokens are below
QUERY_HEADS = (
    r"(conf_|encoder_|decoder_|num_encoder_|num_decoder_|swa_)?(num_|n_)?(attention_heads|heads?)(_per_layer)?"
)
KV_HEADS = r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads"


@dataclass(frozen=True)
class Plan:
    """What the rows need to know: head counts before and after, and the width of one part before and of all after."""

    heads: dict[int, int]
    former_width: int | None
    width: int = WIDTH

    def head_size(self) -> int:
        """The size of a head where nothing else says it."""
        return self.width // max(self.heads.values(), default=WIDTH // HEAD_SIZE)


Small = Callable[[int, Plan], int]


def at_most(limit: int) -> Small:
    return lambda value, _: min(value, limit)


def _width(value: int, plan: Plan) -> int:
    return min(value, plan.width)


def _heads(value: int, plan: Plan) -> int:
    return plan.heads.get(value, min(value, 4))


def _head_size(value: int, plan: Plan) -> int:
    """16, or what makes heads x size the width where it was so before."""
    before = next((heads for heads in plan.heads if heads * value == plan.former_width), None)
    return HEAD_SIZE if before is None else plan.width // plan.heads[before]


INTEGERS: tuple[tuple[str, Small], ...] = (
    (r"(linear|mamba)_(num|n)_(\w+_)?heads|n_mamba_heads|linear_num_heads", at_most(8)),
    (QUERY_HEADS, _heads),
    (KV_HEADS, _heads),
    (r"(\w+_)?(qk_nope|v)_head_dim|\w*rank|linear_(\w+_)?head_dim|mamba_\w*head\w*|mamba_d_head", at_most(16)),
    (r"qk_rope_head_dim|rotary_dim", at_most(8)),
    (r"(\w+_)?(head_dim|head_size)|d_kv|d_head|dim_head|kv_channels", _head_size),
    (r"(\w+_)?(d_state|state_size)", at_most(8)),
    (r"(mamba_)?n_?groups|n_group|num_expert_group", at_most(2)),
    (r"topk_group", at_most(1)),
    (r"(mamba_)?chunk_size|(local|lsh)_attn_chunk_length", at_most(WINDOW)),
    (
        r"(sliding|local|attention|local_attention|attn)_?(window|attention)(_size|_len)?|keep_window_size",
        at_most(WINDOW),
    ),
    (r"index_topk|rel_extent", at_most(WINDOW)),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts|zero_expert_num", at_most(4)),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", at_most(2)),
    (r"(\w+_)?vocab_size(_per_layer_input)?", at_most(VOCAB_SIZE)),
    (r"(\w+_)?(intermediate|ffn_hidden|feed_forward)_size(_mlp)?", at_most(96)),
    (r"(\w+_)?(ffn_dim|mlp_dim)|dff|d_ff|dim_ff|n_inner|d_inner", at_most(96)),
    (r"(\w+_)?(hidden_size|embedding_size|emb_size|d_model|n_embd|emb_dim|embed_dim|embedding_dim)", _width),
    (r"dim|hidden_size_\w+|lru_width|word_embed_proj_dim|(hidden|output)_dim", _width),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", at_most(1)),
)


def shrink(config: PreTrainedConfig, sp_size: int = 2) -> PreTrainedConfig:
    """A tiny configuration of the same class, to be run on `sp_size` ranks; `config` itself is left alone."""
    counts = [count for part in _parts(config) for count in _head_plan(_values(part), sp_size).values()]
    shared = math.lcm(*counts)
    width = shared * SMALLEST_HEAD_SIZE * math.ceil(WIDTH / (shared * SMALLEST_HEAD_SIZE))
    return _Shrinker(sp_size, width).shrink(config)


@dataclass
class _Shrinker:
    """One configuration with its parts; `tokens` gives the same special token the same small number in all of them."""

    sp_size: int
    width: int
    tokens: dict[int, int] = field(default_factory=dict)

    def shrink(self, config: PreTrainedConfig) -> PreTrainedConfig:
        values = _values(config)
        plan = Plan(_head_plan(values, self.sp_size), getattr(config, "hidden_size", None), self.width)
        changes = {name: self._small(name, value, plan) for name, value in values.items()}
        changes |= fewer_layers(values, changes)
        changes |= ODDITIES.get(config.model_type, {})
        return _rebuilt(config, {name: new for name, new in changes.items() if _differs(new, values.get(name))})

    def _small(self, name: str, value: Any, plan: Plan) -> Any:
        if isinstance(value, PreTrainedConfig):
            return self.shrink(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._small(name, entry, plan) for entry in value)
        if name.endswith(("_token_id", "_token_index")) and value is not None:
            return self._small_token(value)
        if name == "rope_parameters" and isinstance(value, dict):
            return short_rope(value, plan.head_size())
        if name == "use_cache":
            return False
        if isinstance(value, float) and ("drop" in name or name.endswith("noise")):
            return 0.0
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return small_integer(name, value, plan) if is_size else value

    def _small_token(self, token: int) -> int:
        if token < FIRST_SPECIAL_ID:
            return token
        return self.tokens.setdefault(token, FIRST_SPECIAL_ID + len(self.tokens))


def small_integer(name: str, value: int, plan: Plan) -> int:
    """What the first row that fits `name` makes of `value`; `value` where none does."""
    return next((small(value, plan) for pattern, small in INTEGERS if re.fullmatch(pattern, name)), value)


def short_rope(parameters: dict[str, Any], head_size: int) -> dict[str, Any]:
    """Rotary settings whose lists have one entry for each pair of a head's features, cut to a smaller head."""
    rotated = int(head_size * parameters.get("partial_rotary_factor", 1.0)) // 2
    short: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            short[name] = short_rope(value, head_size)
        elif name in ("short_factor", "long_factor"):
            short[name] = value[:rotated]
        elif name == "mrope_section":
            rest = [entry * rotated // sum(value) for entry in value[1:]]
            short[name] = [rotated - sum(rest), *rest]
        else:
            short[name] = value
    return short


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in _values(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _head_plan(values: dict[str, Any], sp_size: int) -> dict[int, int]:
    """Every head count divided by the same number, the largest that leaves two heads a rank and the same remainders."""
    queries, keys = (_counts(values, pattern) for pattern in (QUERY_HEADS, KV_HEADS))
    everything = math.gcd(*queries, *keys)
    for divisor in range(everything, 0, -1):
        is_enough = all(n // divisor >= min(n, 2 * sp_size) for n in queries)
        if everything % divisor == 0 and is_enough and _fits_alike(queries, keys, divisor, sp_size):
            return {count: count // divisor for count in queries | keys}
    return {}


def _fits_alike(queries: set[int], keys: set[int], divisor: int, sp_size: int) -> bool:
    alike = all((n % sp_size == 0) == (n // divisor % sp_size == 0) for n in queries | keys)
    return alike and all((sp_size % n == 0) == (sp_size % (n // divisor) == 0) for n in keys if n < sp_size)


def _counts(values: dict[str, Any], pattern: str) -> set[int]:
    found = [value for name, value in values.items() if re.fullmatch(pattern, name)]
    flat = [entry for value in found for entry in (value if isinstance(value, (list, tuple)) else [value])]
    return {entry for entry in flat if isinstance(entry, int) and entry > 0}


def _rebuilt(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """The class called again, so that what it derives from its fields is derived anew."""
    fields = {each.name for each in dataclasses.fields(config)}
    default = _values(type(config)())
    own = {name: value for name, value in _values(config).items() if _differs(value, default.get(name))}
    derived = default.keys() - fields
    return type(config)(**{name: value for name, value in (own | changes).items() if name not in derived})


def _differs(value: Any, other: Any) -> bool:
    """A part always does: a configuration with settings of its own for each layer cannot be compared."""
    return isinstance(value, PreTrainedConfig) or bool(value != other)
