"""Fewer layers, but one of each kind: the lists that say what each layer is, cut alike.

layer_types      [full, linear, linear, full, ...]     ->  [full, linear]
mlp_layer_types  [dense, dense, sparse, sparse, ...]   ->  [dense, sparse]      layers 0, 2 of 48 are kept
full_attn_idxs   [0, 3, ...]                           ->  [0]
"""

from __future__ import annotations

import re
from typing import Any

FEWEST = 2
DEPTH = r"(conf_)?(num_|n_)?((encoder|decoder|t2u_encoder|t2u_decoder|speech_encoder|hidden)_)?(layers?|num_blocks)"
INDICES = r"mlp_only_layers|full_attn_idxs|moe_layers|cross_attention_layers|hybrid_layer_ids|ple_layer_ids"
KINDS_OF_LAYERS = "layers_block_type"
"""The list that some configurations (nemotron_h) have in place of a number of layers."""
MAIN_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def fewer_layers(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The fields to change in a configuration with these values, of which some have been given `changes` already."""
    fewer = {name: min(value, FEWEST) for name, value in values.items() if _is_depth(name, value)}
    main = next((name for name in MAIN_DEPTHS if name in fewer), None)
    depth = values[main] if main is not None else len(values.get(KINDS_OF_LAYERS) or ())
    if depth == 0:
        return fewer
    kept = kept_layers(values, depth)
    if main is not None:
        fewer[main] = len(kept)
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and _is_index_list(name, value):
            fewer[name] = type(value)(kept.index(i) for i in value if i in kept)
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            fewer[name] = type(value)(changes[name][i] for i in kept)
    return fewer


def kept_layers(values: dict[str, Any], depth: int) -> list[int]:
    """The first layer of each kind, and the next ones where there are too few kinds."""
    lists = [v for n, v in values.items() if isinstance(v, (list, tuple)) and not _is_index_list(n, v)]
    indices = [v for n, v in values.items() if isinstance(v, (list, tuple)) and _is_index_list(n, v)]
    per_layer = [value for value in lists if len(value) == depth]
    first: dict[str, int] = {}
    for i in range(depth):
        kind = repr([value[i] for value in per_layer] + [i in value for value in indices])
        first.setdefault(kind, i)
    others = [i for i in range(depth) if i not in first.values()]
    missing = max(FEWEST - len(first), 0)
    return sorted([*first.values(), *others[:missing]])


def _is_depth(name: str, value: Any) -> bool:
    return re.fullmatch(DEPTH, name) is not None and isinstance(value, int) and value > 0


def _is_index_list(name: str, value: Any) -> bool:
    return re.fullmatch(INDICES, name) is not None
