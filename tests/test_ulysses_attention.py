"""`UlyssesSPAttentionHF` by hand: an attention function on slices gives what it gives on whole sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from surgery import ConfigurationError
from surgery.axis import run_lengths
from surgery.ulysses import UlyssesSPAttentionHF
from surgery.verify.comparison import SMALLEST_SHARE, gradients_of, relative_error
from surgery.verify.ranks import RankPool
from tests.counting import CollectiveCounter
from tests.proof import assert_exact
from tests.refusals import refusal
from tests.sampling import sampled
from tests.zoo import make_batch, make_model

N, H, P, LENGTH = 8, 16, 4, 32


class Layer(nn.Module):
    """What an attention function is told of the layer it is in."""

    def __init__(self, num_groups: int = 1, *, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups = num_groups
        self.is_causal = is_causal


def wrap(attn: Callable[..., Any], num_kv_heads: int = N, **options: Any) -> UlyssesSPAttentionHF:
    group = dist.group.WORLD
    assert group is not None
    given = {"seq_length_is_variable": True, **options}
    return UlyssesSPAttentionHF(attn, 1, N, H, num_kv_heads, 2, process_group=group, **given)


def own(x: Tensor, dim: int) -> Tensor:
    """This rank's slice."""
    length = x.shape[dim] // P
    return x.narrow(dim, dist.get_rank() * length, length)


def _tokens(batch_size: int, num_kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch_size, heads, LENGTH, H, generator=generator) for heads in (N, num_kv_heads, num_kv_heads)]


def compare_calls(
    attn: Callable[..., Any],
    whole: dict[str, Any],
    local: dict[str, Any],
    *,
    batch_size: int = 2,
    num_kv_heads: int = N,
    layer: nn.Module | None = None,
) -> dict[str, float]:
    """Errors of this rank's output, and of the gradients of its queries, keys and values."""
    layer = Layer(N // num_kv_heads) if layer is None else layer
    tokens = [x.requires_grad_() for x in _tokens(batch_size, num_kv_heads)]
    expected, _ = attn(layer, *tokens, **{"attention_mask": None, **whole})
    expected = expected.reshape(batch_size, LENGTH, -1)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    slices = [own(x.detach(), 2).clone().requires_grad_() for x in tokens]
    found, _ = wrap(attn, num_kv_heads)(layer, *slices, **{"attention_mask": None, **local})
    (found * own(weights, 1)).sum().backward()
    pairs = [(found, own(expected, 1)), *((s.grad, own(x.grad, 2)) for s, x in zip(slices, tokens, strict=True))]  # type: ignore[arg-type]
    return {name: relative_error(*pair) for name, pair in zip(("output", "query", "key", "value"), pairs, strict=True)}


def _heads(num_kv_heads: int, batch_size: int) -> dict[str, float]:
    positions = torch.arange(LENGTH)[None]
    layer = Layer(N // num_kv_heads)
    errors = compare_calls(
        sdpa_attention_forward,
        {},
        {"position_ids": own(positions, 1)},
        batch_size=batch_size,
        num_kv_heads=num_kv_heads,
        layer=layer,
    )
    assert layer.num_key_value_groups == N // num_kv_heads, "the layer is as it was"
    return errors


def _masked() -> dict[str, float]:
    """Shapes of masks and cores: each names what the whole call is given, and what a slice's is."""
    positions = torch.arange(LENGTH).expand(2, -1)
    packed = torch.cat([torch.arange(11), torch.arange(21)]).expand(2, -1)
    documents = (packed == 0).cumsum(-1)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    same = (documents[:, None, :, None] == documents[:, None, None, :]) & causal
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[0, :5] = 0
    padded = causal & padding[:, None, None, :].bool() | torch.eye(LENGTH, dtype=torch.bool)
    window = causal & ~causal.roll(6, -2).tril(-6)
    per_head = torch.rand(2, N, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    per_head |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.where(same, 0.0, torch.finfo(torch.float32).min)
    block = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    at = {"position_ids": own(positions, 1)}
    cases: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "packed": (sdpa_attention_forward, {"attention_mask": same}, {"position_ids": own(packed, 1)}),
        "packed, with the slice's own block": (
            sdpa_attention_forward,
            {"attention_mask": same},
            {"position_ids": own(packed, 1), "attention_mask": same[:, :, block, block]},
        ),
        "additive": (
            eager_attention_forward,
            {"attention_mask": additive, "scaling": 0.25},
            {"position_ids": own(packed, 1), "attention_mask": additive[:, :, block, block], "scaling": 0.25},
        ),
        "window": (sdpa_attention_forward, {"attention_mask": window}, {**at, "sliding_window": 6}),
        "rows": (sdpa_attention_forward, {"attention_mask": padded}, {**at, "attention_mask": padded[:, :, block]}),
        "rows for each head": (
            sdpa_attention_forward,
            {"attention_mask": per_head},
            {**at, "attention_mask": per_head[:, :, block]},
        ),
        "no positions": (sdpa_attention_forward, {}, {}),
    }
    errors: dict[str, float] = {}
    for name, (attn, whole, local) in cases.items():
        errors |= {f"{name}: {what}": error for what, error in compare_calls(attn, whole, local).items()}
    return errors


def _flash_like(seen: list[Any]) -> Callable[..., Any]:
    """A function that reads windows, padding and positions itself, as flash attention does."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        sliding_window: Any = None,
        **kw: Any,
    ) -> tuple[Tensor, None]:
        seen.append((attention_mask, kw["position_ids"], sliding_window, kw.get("s_aux")))
        return sdpa_attention_forward(module, query, key, value, None)

    return attend


def _told() -> tuple[Any, ...]:
    seen: list[Any] = []
    packed = torch.cat([torch.arange(11), torch.arange(21)]).expand(2, -1)
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, -3:] = 0
    attention = wrap(_flash_like(seen))
    tokens = [own(x, 2) for x in _tokens(2, N)]
    local = {"position_ids": own(packed, 1), "sliding_window": 6, "s_aux": torch.arange(N)}
    attention(Layer(), *tokens, own(padding, 1), **local)
    mask, positions, window, sinks = seen[0]
    return torch.equal(mask, padding), torch.equal(positions, packed), window, sinks.tolist()


def test_heads(ranks: RankPool) -> None:
    for num_kv_heads, batch_size in ((8, 1), (4, 3), (2, 2), (1, 2)):
        assert_exact(ranks.run(_heads, num_kv_heads, batch_size))


def test_masks(ranks: RankPool) -> None:
    assert_exact(ranks.run(_masked))


def test_what_a_flash_function_is_told(ranks: RankPool) -> None:
    for rank, told in enumerate(ranks.run(_told)):
        assert told == (True, True, 6, [2 * rank, 2 * rank + 1])


def _uneven() -> dict[str, float]:
    """29 tokens on 4 ranks, packed."""
    lengths = run_lengths(29, P)
    tokens = [x[:, :, :29] for x in _tokens(2, N)]
    positions = torch.cat([torch.arange(11), torch.arange(18)]).expand(2, -1)
    documents = (positions == 0).cumsum(-1)
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    query, key, value = tokens
    expected, _ = sdpa_attention_forward(Layer(), query, key, value, mask)
    mine = [x.split(lengths, dim=2)[dist.get_rank()] for x in tokens]
    local = positions.split(lengths, dim=1)[dist.get_rank()]
    found, _ = wrap(sdpa_attention_forward)(Layer(), *mine, None, position_ids=local)
    return {"output": relative_error(found, expected.flatten(2).split(lengths, dim=1)[dist.get_rank()])}


def test_lengths_that_do_not_divide(ranks: RankPool) -> None:
    assert_exact(ranks.run(_uneven))


def _reused() -> dict[str, float]:
    """The same tensor as key and value, and the query used again afterwards."""
    _, key, _ = _tokens(2, N)
    query = _tokens(2, N)[0].requires_grad_()
    expected, _ = sdpa_attention_forward(Layer(), query, key, key, None)
    (expected.reshape(2, LENGTH, -1) + query.transpose(1, 2).flatten(2)).square().sum().backward()
    mine = own(query.detach(), 2).clone().requires_grad_()
    local = own(key, 2)
    found, _ = wrap(sdpa_attention_forward)(Layer(), mine, local, local, None)
    (found + mine.transpose(1, 2).flatten(2)).square().sum().backward()
    assert mine.grad is not None and query.grad is not None
    return {"query": relative_error(mine.grad, own(query.grad, 2))}


def test_tensors_that_are_used_twice(ranks: RankPool) -> None:
    assert_exact(ranks.run(_reused))


@contextmanager
def _attending(attn: Any) -> Iterator[None]:
    """Let models that ask for sdpa call `attn`."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attn
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _model_by_hand(name: str, kind: str) -> tuple[dict[str, float], int]:
    """A model of transformers on slices: the loss and every gradient, and the collectives that are no exchange."""
    model = make_model(name, num_hidden_layers=2)
    reference = copy.deepcopy(model)
    batch = make_batch(2, LENGTH)
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {"input_ids": batch["input_ids"], "position_ids": torch.arange(LENGTH).expand(2, -1)}
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(11), torch.arange(21)]).expand(2, -1)
    if kind == "padded":
        mask = torch.ones_like(labels)
        mask[0, :10] = 0
        inputs["attention_mask"], labels = mask, labels.masked_fill(mask == 0, -100)
    expected = reference(**inputs, use_cache=False).logits
    loss = nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    loss.backward()
    group = dist.group.WORLD
    assert group is not None
    attention = UlyssesSPAttentionHF(sdpa_attention_forward, 2, 8, 8, 4, 2, group, seq_length_is_variable=True)
    local = {name: own(x, 1) for name, x in inputs.items()}
    with _attending(attention), CollectiveCounter() as counter:
        logits = model(**local, use_cache=False).logits
        addend = nn.functional.cross_entropy(logits.flatten(0, 1), own(labels, 1).flatten(), reduction="sum")
        (addend / (labels != -100).sum() * P).backward()
    whole = gradients_of(reference)
    floor = SMALLEST_SHARE * max(float(gradient.abs().max()) for gradient in whole.values())
    errors = {n: relative_error(g, whole[n], floor) for n, g in gradients_of(model, group).items()}
    real = own(inputs.get("attention_mask", torch.ones_like(labels)), 1).bool()
    errors["logits"] = relative_error(logits[real], own(expected, 1)[real]) if bool(real.any()) else 0.0
    return errors, counter.calls["all_gather_into_tensor"]


BY_HAND = [("llama", "plain"), ("llama", "packed"), ("llama", "padded"), ("mistral", "plain")]


@pytest.mark.parametrize(("name", "kind"), sampled(BY_HAND, {("llama", "packed"), ("mistral", "plain")}))
def test_a_model_on_slices(ranks: RankPool, name: str, kind: str) -> None:
    errors, gathers = zip(*ranks.run(_model_by_hand, name, kind), strict=True)
    assert_exact(list(errors))
    assert set(gathers) == {2}, "lengths and integers once a step, never a layer"


def _refused() -> dict[str, str]:
    rank = dist.get_rank()
    attention, tokens = wrap(sdpa_attention_forward), [own(x, 2) for x in _tokens(2, N)]
    positions = torch.arange(LENGTH).expand(2, -1)
    at = {"position_ids": own(positions, 1)}
    llama = make_model("llama").model.layers[0].self_attn

    def call(mask: Any = None, module: Any = None, **kwargs: Any) -> str:
        return refusal(lambda: attention(module or Layer(), *tokens, mask, **kwargs))

    odd = torch.rand(2, 1, 8, 8) < 0.5
    return {
        "restarting": call(position_ids=torch.arange(8).expand(2, -1)),
        "restarting on purpose": call(
            position_ids=torch.arange(8).expand(2, -1),
            cu_seq_lens_q=torch.arange(0, 65, 8),
            cu_seq_lens_k=torch.arange(0, 65, 8),
        ),
        "odd mask": call(odd, **at),
        "odd on one rank": call(odd if rank == 1 else None, **at),
        "unknown mask": call(object(), **at),
        "offsets": call(**at, cu_seq_lens_q=torch.tensor([0, 8])),
        "tensor": call(**at, position_bias=torch.zeros(1, N, 8, 8)),
        "weights": call(**at, output_attentions=True),
        "no positions": call(module=llama),
        "joined documents": call(
            module=llama, position_ids=own(torch.cat([torch.arange(3), torch.arange(29)]).expand(2, -1), 1)
        ),
        "heads": refusal(lambda: attention(Layer(), tokens[0][:, :4], *tokens[1:], None)),
        "lengths": refusal(lambda: attention(Layer(), *(x[:, :, : 8 - rank] for x in tokens), None)),
        "fixed": refusal(
            lambda: wrap(
                sdpa_attention_forward, seq_length_is_variable=False, local_seq_length=4, global_seq_length=16
            )(Layer(), *tokens, None)
        ),
        "after": call(**at),
    }


def test_refusals(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(_refused)):
        assert "start again at 0 on each of 4 ranks" in found["restarting"]
        assert "over this rank's own tokens" in found["odd mask"]
        assert ("over this rank's own tokens" if rank == 1 else "slices of rank 1") in found["odd on one rank"]
        assert "found object" in found["unknown mask"]
        assert "ending at 64, found 8" in found["offsets"]
        assert "position_bias" in found["tensor"]
        assert "output_attentions" in found["weights"]
        assert "LlamaAttention does not pass position_ids" in found["no positions"]
        assert ("Leave the attention_mask out" if rank == 0 else "slices of rank 0") in found["joined documents"]
        assert "expected query [B, 8, 8, 16]" in found["heads"]
        assert "expected slices of 6, 7, 6, 7 tokens, found 8, 7, 6, 5" in found["lengths"]
        assert "expected query [B, 8, 4, 16]" in found["fixed"]
        assert found["restarting on purpose"] == found["after"] == "no error"


def _bad_construction() -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    found = []
    for heads, kv_heads, options in ((6, 2, {"seq_length_is_variable": True}), (8, 3, {}), (8, 8, {})):
        try:
            UlyssesSPAttentionHF(sdpa_attention_forward, 1, heads, H, kv_heads, 2, group, **options)
        except ConfigurationError as error:
            found.append(str(error))
    return found


def test_bad_construction(ranks: RankPool) -> None:
    for heads, kv_heads, lengths in ranks.run(_bad_construction):
        assert "found 6 and 2" in heads
        assert "found 8 and 3" in kv_heads
        assert "global_seq_length of 4 times local_seq_length" in lengths


def _bypassed() -> tuple[bool, int]:
    layer = Layer().eval()
    tokens = _tokens(2, N)
    query, key, value = tokens
    expected, _ = sdpa_attention_forward(layer, query, key, value, None)
    with CollectiveCounter() as counter:
        found, _ = wrap(sdpa_attention_forward, disable_in_eval=True)(layer, *tokens, None)
    return torch.equal(found, expected), counter.total


def test_eval_bypass(ranks: RankPool) -> None:
    assert ranks.run(_bypassed) == [(True, 0)] * P
