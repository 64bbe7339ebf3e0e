"""What a step costs, as counts: collectives, bytes on the wire, saved activations, replicated values."""

from __future__ import annotations

import copy

import pytest
import torch

from surgery import restore, transform
from surgery.metadata import facts_of
from surgery.placement import Replicated
from surgery.shapes import length_dims, shape_of
from tests.counting import CollectiveCounter, SavedActivations
from tests.sampling import sampled
from tests.zoo import make_batch, make_model

NUM_LAYERS = 2
BATCH_SIZE, LENGTH, HEAD_SIZE, ELEMENT_SIZE = 2, 32, 8, 4


def _count_step(
    name: str, sp_size: int, num_kv_heads: int
) -> tuple[dict[str, int], dict[str, int], list[int], list[int]]:
    """Collectives forward and backward, and the bytes that each all-to-all sends."""
    model = transform(make_model(name, num_hidden_layers=NUM_LAYERS, num_key_value_heads=num_kv_heads), sp_size)
    batch = make_batch(BATCH_SIZE, LENGTH)
    model(**batch)
    with CollectiveCounter() as forward:
        loss = model(**batch).loss
    with CollectiveCounter() as backward:
        loss.backward()
    sizes = [counter.sizes_bytes["all_to_all_single"] for counter in (forward, backward)]
    restore(model)
    return dict(forward.calls), dict(backward.calls), *sizes


COUNTED = [(2, 8), (2, 4), (4, 4), (4, 2), (4, 1)]
DECODERS = ["llama", "gemma3_text", "gpt2", "opt", "gpt_neox", "phi3", "mixtral"]
SAVED = [(name, sp_size) for name in ("llama", "qwen3", "gpt2") for sp_size in (2, 4)]


@pytest.mark.parametrize(("sp_size", "num_kv_heads"), sampled(COUNTED, {(2, 4), (4, 4), (4, 1)}))
@pytest.mark.usefixtures("fake_ranks")
def test_two_all_to_alls_each_way_and_one_scalar_each_way(sp_size: int, num_kv_heads: int) -> None:
    forward, backward, sent_forward, sent_backward = _count_step("llama", sp_size, num_kv_heads)
    assert forward == {"all_to_all_single": 2 * NUM_LAYERS, "all_reduce": 1}
    assert backward == {"all_to_all_single": 2 * NUM_LAYERS, "all_reduce": 1}
    tokens = BATCH_SIZE * LENGTH // sp_size
    kv_heads = max(num_kv_heads, sp_size)  # a key/value head goes once to each rank whose queries need it
    packed = tokens * (8 + 2 * kv_heads) * HEAD_SIZE * ELEMENT_SIZE
    output = tokens * 8 * HEAD_SIZE * ELEMENT_SIZE
    assert sent_forward == [packed, output] * NUM_LAYERS
    assert sent_backward == [output, packed] * NUM_LAYERS


def _saved_share(name: str, sp_size: int) -> float:
    model = make_model(name, num_hidden_layers=3)
    reference = copy.deepcopy(model)
    batch = make_batch(2, 256)
    with SavedActivations(reference) as whole:
        reference(**batch, use_cache=False)
    transform(model, sp_size)
    model(**batch)
    with SavedActivations(model) as sharded:
        model(**batch)
    restore(model)
    return sharded.total_bytes / whole.total_bytes


@pytest.mark.parametrize(("name", "sp_size"), sampled(SAVED, {("llama", 2), ("llama", 4), ("gpt2", 4)}))
@pytest.mark.usefixtures("fake_ranks")
def test_saved_activations_are_a_share(name: str, sp_size: int) -> None:
    assert _saved_share(name, sp_size) <= 1.1 / sp_size


@pytest.mark.parametrize(
    "name",
    sampled(DECODERS, {"gemma3_text", "gpt2", "mixtral"}),
)
def test_whole_values_are_integers_and_scalars(name: str) -> None:
    program = transform(make_model(name), 4).surgery.programs[0]
    lengths = program.context.lengths
    for node in program.graph.nodes:
        value = node.meta.get("val")
        is_tensor = node.op == "call_function" and isinstance(value, torch.Tensor)
        is_whole = is_tensor and isinstance(facts_of(node).placement, Replicated)
        if is_whole and length_dims(shape_of(value), lengths):
            is_one_number_a_token = value.ndim <= 2
            assert not value.is_floating_point() or is_one_number_a_token, f"{node} {value.shape} is whole"


def test_no_square_mask_for_causal_attention() -> None:
    program = transform(make_model("llama"), 4).surgery.programs[0]
    lengths = program.context.lengths
    shapes = [shape_of(n.meta["val"]) for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert all(len(length_dims(shape, lengths)) <= 1 for shape in shapes)


def test_one_mask_for_all_sliding_layers() -> None:
    program = transform(make_model("mistral", num_hidden_layers=4), 4).surgery.programs[0]
    lengths = program.context.lengths
    (mask,) = {site.node.args[3] for site in program.context.sites}
    assert mask.target.__name__ == "make_mask"
    assert len(length_dims(shape_of(mask.meta["val"]), lengths)) == 2
