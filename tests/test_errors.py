"""Bad input gets an error that says what was expected, found, where and what to do, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from surgery import (
    CaptureError,
    ConfigurationError,
    InputError,
    LaunchError,
    SurgeryError,
    UnsupportedOperationError,
    restore,
    transform,
)
from surgery.inputs.signature import CACHES
from surgery.verify.ranks import RankPool
from tests.refusals import refusal
from tests.zoo import make_batch, make_model


@pytest.mark.parametrize("sp_size", [0, -2, 2.0, "4", True])
def test_sp_size_must_be_a_positive_integer(sp_size: Any) -> None:
    with pytest.raises(ConfigurationError, match="positive integer, found"):
        transform(make_model("llama"), sp_size)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradients": "average"}, "'mean' or 'sum'"),
        ({"on_unknown": "ignore"}, "'gather' or 'refuse'"),
        ({"check_inputs": True}, "'first' or 'always' or 'never'"),
        ({"seq_length_is_variable": False}, "needs a length"),
        ({"seq_length": 0}, "a number of tokens, found 0"),
    ],
)
def test_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        transform(make_model("llama"), 4, **options)


EXAMPLES: list[tuple[Any, type[SurgeryError], str]] = [
    ([1, 2], ConfigurationError, "keyword arguments, found list"),
    ({"words": torch.zeros(2, 8)}, InputError, "a batch of token sequences.*found words"),
    ({**make_batch(2, 8), "output_attentions": True}, InputError, "output_attentions=True"),
]


@pytest.mark.parametrize(("example", "kind", "words"), EXAMPLES)
def test_examples(example: Any, kind: type[SurgeryError], words: str) -> None:
    model = make_model("llama")
    with pytest.raises(kind, match=words):
        transform(model, 2, example=example)
    assert "forward" not in model.__dict__


def test_transformed_already_then_restored() -> None:
    model = transform(make_model("llama"), 2)
    with pytest.raises(ConfigurationError, match="restore"):
        transform(model, 2)
    transform(restore(model), 4)


def test_restoring_an_untouched_model() -> None:
    with pytest.raises(ConfigurationError, match="untouched"):
        restore(make_model("llama"))


class Bag(nn.Module):
    """A language model without attention: the mean of the embeddings is never taken over tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(99, 16)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        logits = self.embed(input_ids) @ self.embed.weight.T
        if labels is None:
            return (logits,)
        return torch.nn.functional.cross_entropy(logits.view(-1, 99), labels.view(-1)), logits


def test_no_attention() -> None:
    with pytest.raises(ConfigurationError, match="no attention"):
        transform(Bag(make_model("llama").config), 2)


@pytest.mark.parametrize("name", ["no-such-model/anywhere", "."])
def test_a_string_that_is_no_model(name: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigurationError, match="hub name or a local path"):
        transform(str(tmp_path) if name == "." else name, 2)


def test_not_a_transformers_model() -> None:
    with pytest.raises(ConfigurationError, match="with a config, found Linear"):
        transform(nn.Linear(2, 2), 2)


class Branching(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) if x.sum().item() > 0 else x


def test_not_exportable() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp = Branching(model.model.layers[0].mlp)
    with pytest.raises(UnsupportedOperationError, match=r"layers\.0\.mlp.*Branching is called whole.*on_unknown"):
        transform(model, 2, on_unknown="refuse")
    assert "forward" not in model.__dict__


def _checkpoint(model: Any) -> None:
    model.gradient_checkpointing = True


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _offload(model: Any) -> None:
    model.model.layers[0]._hf_hook = object()


def _quantize(model: Any) -> None:
    model.is_quantized = True


def _record(model: Any) -> None:
    model.config.output_hidden_states = True


DROPPED: dict[Callable[[Any], None], str] = {
    _checkpoint: "gradient checkpointing is switched on in LlamaForCausalLM",
    _hook: r"a hook .* on model\.layers\.0\.mlp",
    _offload: r"model\.layers\.0 are offloaded",
    _quantize: "quantized",
    _record: "output_hidden_states",
}


@pytest.mark.parametrize("change", DROPPED, ids=lambda change: change.__name__)
def test_what_a_graph_would_drop(change: Callable[[Any], None]) -> None:
    model = make_model("llama")
    change(model)
    with pytest.raises(CaptureError, match=DROPPED[change]):
        transform(model, 2)


def test_a_model_without_ranks_says_how_to_launch() -> None:
    model = transform(make_model("llama"), 4)
    with pytest.raises(LaunchError, match="torchrun --nproc-per-node 4"):
        model(**make_batch(2, 32))


@pytest.mark.parametrize("value", [[1, 2], {"full_attention": torch.ones(2, 32)}, (torch.ones(2, 32),)])
def test_arguments_whose_contents_may_change(value: Any) -> None:
    model = transform(make_model("llama"), 2)
    with pytest.raises(InputError, match=r"attention_mask: a (list|dict|tuple), whose contents"):
        model.surgery.prepare(**make_batch(2, 32), attention_mask=value)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_in_training(name: str) -> None:
    model = transform(make_model("llama"), 2)
    with pytest.raises(InputError, match=f"{name} in training mode"):
        model.surgery.prepare(**make_batch(2, 32), **{name: DynamicCache()})


def _calls_refused() -> dict[str, str]:
    model = transform(make_model("llama"), 4)
    batch = make_batch(2, 32)
    found = {
        "nothing": refusal(lambda: model()),
        "unknown": refusal(lambda: model(batch["input_ids"], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)),
        "hidden": refusal(lambda: model(**batch, output_hidden_states=True)),
        "after": refusal(lambda: model(**batch)),
    }
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: None)
    found["hook"] = refusal(lambda: model(**batch))
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found["autocast"] = refusal(lambda: model(**batch))
    rank = dist.get_rank()
    found["other batch"] = refusal(lambda: model(**make_batch(3, 32, seed=rank)))
    restore(model)
    return found


def _disagreements() -> dict[str, str]:
    rank = dist.get_rank()
    model = transform(make_model("llama"), 4, check_inputs="always")
    model(**make_batch(2, 32))
    found = {
        "contents": refusal(lambda: model(**make_batch(2, 32, seed=rank))),
        "length": refusal(lambda: model(**make_batch(2, 32 + rank))),
        "arguments": refusal(lambda: model(**dict(list(make_batch(2, 32).items())[: 2 - rank % 2]))),
        "after": refusal(lambda: model(**make_batch(2, 32))),
    }
    restore(model)
    return found


def test_calls(ranks: RankPool) -> None:
    for found in ranks.run(_calls_refused):
        assert found["nothing"].startswith("InputError: expected a batch")
        assert found["unknown"].startswith("InputError: the model's forward cannot take")
        assert found["hidden"].startswith("InputError: output_hidden_states=True")
        assert found["after"] == "no error"
        assert "model.layers.0" in found["hook"]
        assert "autocast" in found["autocast"]
        assert found["other batch"] == "no error", "the same arguments were checked on their first call"


def test_ranks_that_disagree(ranks: RankPool) -> None:
    for found in ranks.run(_disagreements):
        assert "differ in contents" in found["contents"]
        assert "(32, 33, 34, 35)" in found["length"]
        assert "differ in arguments" in found["arguments"]
        assert found["after"] == "no error"


def _bad_transforms() -> dict[str, str]:
    rank = dist.get_rank()
    model = make_model("llama")
    found = {
        "too large": refusal(lambda: transform(model, 8)),
        "not dividing": refusal(lambda: transform(model, 3)),
        "ranks disagree": refusal(lambda: transform(model, 2 + 2 * (rank % 2))),
        "untouched": str("forward" not in model.__dict__ and "surgery" not in model.__dict__),
        "then": refusal(lambda: transform(model, 4)),
        "runs": refusal(lambda: model(**make_batch(2, 32))),
    }
    restore(model)
    return found


def test_transforms_that_fail_can_be_followed_by_one_that_works(ranks: RankPool) -> None:
    for found in ranks.run(_bad_transforms):
        assert "sp_size 8 does not divide the world of 4 ranks" in found["too large"]
        assert "sp_size 3 does not divide the world of 4 ranks. Use sp_size 1, 2, 4" in found["not dividing"]
        assert "expected the same sp_size on every rank" in found["ranks disagree"]
        assert found["untouched"] == "True"
        assert found["then"] == found["runs"] == "no error"


def _fixed_length() -> list[str]:
    model = transform(make_model("llama"), 2, seq_length=32, seq_length_is_variable=False)
    found = [refusal(partial(model, **make_batch(2, length))) for length in (32, 64)]
    restore(model)
    return found


def test_a_fixed_length_refuses_others(pair: RankPool) -> None:
    for fitting, other in pair.run(_fixed_length):
        assert fitting == "no error"
        assert "expected sequences of 32 tokens" in other


def test_an_attention_call_with_something_for_each_head_is_refused_on_request() -> None:
    class Sloped(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["slopes"] = torch.ones(8)
            return super().forward(*args, **kwargs)

    model = make_model("llama")
    model.model.layers[0].self_attn.__class__ = Sloped
    named = r"Sloped is called whole.*model\.layers\.0\.self_attn passes slopes of shape \(8,\).*8 heads"
    with pytest.raises(UnsupportedOperationError, match=named):
        transform(model, 2, on_unknown="refuse")


class Reversed(torch.autograd.Function):
    """A gradient reversal: its backward is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


class WithReversal(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(Reversed.apply(x))  # type: ignore[no-untyped-call]


def test_a_backward_of_ones_own_is_not_lost() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp = WithReversal(model.model.layers[0].mlp)
    with pytest.raises(UnsupportedOperationError, match=r"Reversed is a torch\.autograd\.Function.*on_unknown"):
        transform(model, 2, on_unknown="refuse")


def _different_options() -> str:
    model = make_model("llama")
    return refusal(lambda: transform(model, 4, gradients="sum" if dist.get_rank() else "mean"))


def test_ranks_with_different_options(ranks: RankPool) -> None:
    for found in ranks.run(_different_options):
        assert "expected the same options on every rank" in found
