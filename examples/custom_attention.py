"""Keep an attention function of your own: it is called on each rank with that rank's heads and the whole sequence.

torchrun --nproc-per-node 2 examples/custom_attention.py
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from launch import join_ranks
from quickstart import average_gradients, comparison, difference, paired_gradients
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from surgery import transform

TOLERANCE = 1e-5
CAP = 5.0
DOCUMENTS = (100, 156)  # tokens, packed into one row
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)

seen: list[str] = []


def capped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax over scores that tanh keeps below a cap: [B, N, S, H] -> [B, S, N, H], as transformers asks for it."""
    seen.append(f"query {list(query.shape)}, key {list(key.shape)}")
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = CAP * torch.tanh(query @ key.transpose(2, 3) * scaling / CAP)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def capped_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa's boolean mask [B, 1, S, S], which tells documents apart; never left out, as nothing above is causal."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def main() -> None:
    AttentionInterface.register("capped", capped_attention)
    AttentionMaskInterface.register("capped", capped_mask)
    with join_ranks() as ranks:
        torch.manual_seed(0)
        config = copy.deepcopy(CONFIG)
        config._attn_implementation = "capped"
        reference: nn.Module = LlamaForCausalLM(config)
        reference.to(ranks.device)
        ids = torch.randint(CONFIG.vocab_size, (1, sum(DOCUMENTS)), device=ranks.device)
        positions = torch.cat([torch.arange(length, device=ranks.device) for length in DOCUMENTS])[None]
        batch = {"input_ids": ids, "labels": ids, "position_ids": positions}

        model = transform(copy.deepcopy(reference), sp_size=ranks.world_size)
        ranks.console.print(model.surgery.report())

        expected = reference(**batch, use_cache=False)  # with a cache, transformers does not look for documents
        expected.loss.backward()
        ranks.console.print("", "capped_attention was called with", f"    unsharded:         {seen[-1]}", sep="\n")
        found = model(**batch)
        found.loss.backward()
        ranks.console.print(f"    on one of {ranks.world_size} ranks: {seen[-1]}\n")
        average_gradients(model)

        values = {"loss": (expected.loss, found.loss)}
        gradients = paired_gradients(reference, model)
        ranks.console.print(comparison(values, gradients, f"1 rank and {ranks.world_size}, documents of {DOCUMENTS}"))
        worst = max(difference(*pair) for pair in (*values.values(), *gradients.values()))
        ranks.console.print(f"Largest difference over all {len(gradients)} gradients and the loss: {worst:.1e}")
        if worst > TOLERANCE:
            sys.exit(1)


if __name__ == "__main__":
    main()
