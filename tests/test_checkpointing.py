"""Gradient checkpointing, switched on as in any transformers model: exact, and activations are not kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery import restore, transform
from surgery.verify.comparison import compare
from tests.counting import CollectiveCounter, SavedActivations
from tests.proof import assert_exact
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model

NUM_LAYERS = 3


def make_checkpointed(name: str) -> Any:
    model = make_model(name, num_hidden_layers=NUM_LAYERS) if name == "llama" else make_model(name)
    model.gradient_checkpointing_enable()
    return model


def _prove(name: str, sp_size: int) -> dict[str, float]:
    return compare(make_checkpointed(name), sp_size, make_batch(2, 32))


@pytest.mark.parametrize("name", sampled(["llama", "mixtral", "gpt2"], {"llama"}))
def test_exact(world: World, name: str) -> None:
    assert_exact(world.run(_prove, name, world.sp_size))


def _prove_compiled(sp_size: int) -> dict[str, float]:
    torch._dynamo.reset()
    model = make_checkpointed("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    return compare(model, sp_size, make_batch(2, 32), run=compiled)


def test_exact_when_compiled(world: World) -> None:
    assert_exact(world.run(_prove_compiled, world.sp_size))


def _saved_and_sent(sp_size: int, is_checkpointed: bool) -> tuple[int, int]:
    """Bytes saved for backward, and the all-to-alls of a step."""
    model = make_model("llama", num_hidden_layers=NUM_LAYERS)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    transform(model, sp_size)
    batch = make_batch(2, 256)
    with SavedActivations(model) as saved, CollectiveCounter() as counter:
        model(**batch).loss.backward()
    restore(model)
    return saved.total_bytes, counter.calls["all_to_all_single"]


def test_activations_are_recomputed(world: World) -> None:
    kept, sent = world.run(_saved_and_sent, world.sp_size, False)[0]
    kept_less, sent_again = world.run(_saved_and_sent, world.sp_size, True)[0]
    assert sent == 4 * NUM_LAYERS
    assert sent_again == 6 * NUM_LAYERS, "the forward's two are run again"
    assert kept_less < kept


def _switched(sp_size: int) -> list[int]:
    """The programs after steps with checkpointing off, on, and off again."""
    model = transform(make_model("llama"), sp_size)
    batch = make_batch(2, 32)
    model(**batch)
    model.gradient_checkpointing_enable()
    model(**batch)
    found = [len(model.surgery.programs)]
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    model(**batch)
    found.append(len(model.surgery.programs))
    restore(model)
    return found


def test_switching_captures_nothing(world: World) -> None:
    assert world.run(_switched, world.sp_size) == [[1, 1]] * world.sp_size
