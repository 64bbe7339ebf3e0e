"""Any length: sequences that P does not divide, and sequences of fewer tokens than ranks, are exact too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from surgery import CaptureError, InputError, restore, transform
from surgery.axis import Axis, first_token, local_length, run_lengths
from surgery.inputs.signature import describe_tensor
from surgery.private import GroupName
from surgery.verify.catalog import list_architectures
from surgery.verify.comparison import compare, float_is_double
from surgery.verify.ranks import RankPool
from surgery.verify.shrink import shrink
from surgery.verify.trial import build
from tests.planted import ODD_LENGTHS, PLANTED, make_planted
from tests.proof import assert_calls_exact, assert_exact, prove, prove_batches, prove_unchanged
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import ARCHITECTURES, OTHERS, make_batch, make_model

SHORT = 3
"""Fewer tokens than the four ranks."""


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 10, 31, 32])
def test_runs_are_balanced_and_cover_the_sequence(length: int, size: int) -> None:
    lengths = run_lengths(length, size)
    assert sum(lengths) == length
    assert max(lengths) - min(lengths) <= 1
    for rank, own in enumerate(lengths):
        assert first_token(length, rank, size) == sum(lengths[:rank])
        assert local_length(length, Axis(size, rank, GroupName("sp"))) == own


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "dims"),
    [
        ("inputs_embeds", torch.float32, (2, 64, 64), ("b", "s", 64)),
        ("encoder_hidden_states", torch.float32, (2, 5, 64), ("b", 5, 64)),
        ("perm_mask", torch.float32, (2, 64, 64), ("b", "s", "s")),
        ("attention_mask", torch.bool, (2, 64, 64, 64), ("b", 64, "s", "s")),
        ("position_ids", torch.int64, (3, 2, 64), (3, "b", "s")),
        ("position_ids", torch.int64, (3, 1, 64), (3, 1, "s")),
        ("position_ids", torch.int64, (2, 3, 64), ("b", 3, "s")),
    ],
)
def test_sizes_that_happen_to_be_the_length(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], dims: tuple[int | str, ...]
) -> None:
    """Features, heads, axes of positions, choices: whose size it is the argument says, not the number."""
    assert describe_tensor(name, torch.zeros(shape, dtype=dtype), 2, {"s": 64}).dims == dims


@pytest.mark.parametrize("name", sampled(["llama", "gpt2"], {"llama"}))
def test_odd_lengths(ranks: RankPool, name: str) -> None:
    """One graph for all, and one for single sequences, as torch.export specializes a batch of one."""
    batches = [make_batch(3, 33), make_batch(2, SHORT), make_batch(1, 31)]
    assert_calls_exact(ranks.run(prove_batches, name, 4, batches), num_programs=2)


def test_odd_lengths_on_two_ranks(pair: RankPool) -> None:
    batches = [make_batch(2, SHORT), make_batch(3, 33)]
    assert_calls_exact(pair.run(prove_batches, "llama", 2, batches), num_programs=1)


LOOKS_AT_THE_LENGTH = {"big_bird"}
"""It writes to its config that short sequences have no blocks, which is captured anew."""


@pytest.mark.parametrize("name", sampled([*ARCHITECTURES, *OTHERS], {"mistral", "gpt_oss"}))
def test_odd_lengths_elsewhere(world: World, name: str) -> None:
    """By default windows, experts, sinks and gathered operations."""
    results = world.run(prove_batches, name, world.sp_size, [make_batch(2, 31), make_batch(2, SHORT)])
    assert_calls_exact(results, num_programs=2 if name in LOOKS_AT_THE_LENGTH else 1)


IMPOSSIBLE = {"pooled_by_four", "every_other_token"}
"""Fours and pairs of tokens: the unsharded model cannot run them at odd lengths either."""
NOT_EXPORTABLE = {"max_pool", "chunk_tokens"}


def _prove_planted(name: str, length: int) -> dict[str, float]:
    return compare(make_planted(name), 2, make_batch(2, length))


@pytest.mark.parametrize("name", sampled(sorted(PLANTED.keys() - IMPOSSIBLE - NOT_EXPORTABLE), ODD_LENGTHS))
def test_planted_operations(pair: RankPool, name: str) -> None:
    assert_exact(pair.run(_prove_planted, name, 31))


def _prove_summaries(sp_size: int) -> Any:
    batches = [make_batch(2, length) for length in (32, 36, 33, 37, 45, 7, SHORT)]
    return prove_unchanged(make_planted("summaries_of_fours"), sp_size, batches)


def test_groups_of_tokens_with_a_rest(world: World) -> None:
    """A graph for each remainder of the length, which serves all lengths that leave it on its side of a branch."""
    assert_calls_exact(world.run(_prove_summaries, world.sp_size), num_programs=4)


class TiedDecoder(nn.Module):
    """A decoder that weighs its input by how its length compares with the encoder's."""

    def __init__(self, decoder: nn.Module, is_tied: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.decoder = decoder
        self.is_tied = is_tied

    def forward(self, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        output = self.decoder(encoder_hidden_states=encoder_hidden_states, **kwargs)
        length, decoder_length = encoder_hidden_states.shape[1], output.last_hidden_state.shape[1]
        if self.is_tied(length, decoder_length):
            output.last_hidden_state = output.last_hidden_state * 2
        return output


def make_tied(is_tied: Callable[[int, int], bool]) -> Any:
    model = make_model("bart", auto=AutoModelForSeq2SeqLM)
    model.model.decoder = TiedDecoder(model.model.decoder, is_tied)
    return model


@pytest.mark.parametrize("surplus", [0, 1])
def test_a_length_that_follows_from_another_is_refused(surplus: int) -> None:
    batch = make_batch(2, 24 + surplus)
    batch["labels"] = batch["labels"][:, :24].clone()
    with pytest.raises(CaptureError, match="always be equal" if surplus == 0 else "sequence"):
        transform(make_tied(lambda length, decoder_length: length == decoder_length + surplus), 2, example=batch)


def test_a_graph_for_two_sequences_of_one_length() -> None:
    (program,) = transform(make_model("bart", auto=AutoModelForSeq2SeqLM), 2).surgery.programs
    length, _ = program.context.lengths
    tied = replace(program, context=replace(program.context, lengths=(length, length)))
    assert program.serves(2, 24, 30) and not tied.serves(2, 24, 30)
    assert tied.serves(2, 24, 24)


def _prove_blockwise(model_type: str, sp_size: int, lengths: tuple[int, ...]) -> Any:
    (architecture,) = (each for each in list_architectures() if each.model_type == model_type)
    config: Any = shrink(architecture.default_config(), sp_size)
    config.num_hidden_layers = 2
    model: Any = build(architecture.make, config).double()
    model.config._experts_implementation = "eager"  # grouped_mm has no float64
    with float_is_double():
        return prove_unchanged(model, sp_size, [make_batch(2, length) for length in lengths])


def test_compressed_attention(world: World) -> None:
    """Keys of the tokens, and of every 8 of them in one layer, of every 4 in the other."""
    lengths = {2: (31,), 4: (32, 31, 40)}[world.sp_size]
    results = world.run(_prove_blockwise, "deepseek_v4", world.sp_size, lengths)
    assert_calls_exact(results, num_programs=min(len(lengths), 2), dtype=torch.float64)


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", ["longt5", "pegasus_x"])
def test_encoders_in_blocks(ranks: RankPool, model_type: str) -> None:
    """Blocks of 8 and of 16 tokens, the last of which is padded."""
    results = ranks.run(_prove_blockwise, model_type, 4, (32, 31, 48))
    assert_calls_exact(results, num_programs=2, dtype=torch.float64)


def _prove_otherwise(sp_size: int, length: int) -> list[dict[str, float]]:
    """Gradient checkpointing, gradients that add up, an odd fixed length."""
    checkpointed = make_model("llama")
    checkpointed.gradient_checkpointing_enable()
    batch = make_batch(2, length)
    return [
        compare(checkpointed, sp_size, batch),
        compare(make_model("llama"), sp_size, batch, gradients="sum", scale=sp_size),
        compare(make_model("llama"), sp_size, batch, seq_length=length, seq_length_is_variable=False),
    ]


def _prove_longrope(sp_size: int) -> Any:
    """On both sides of its original length, and captured again for a call without labels."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes: dict[str, Any] = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    changes = {"rope_parameters": {**rope, "original_max_position_embeddings": 16}, **sizes}
    batches = [make_batch(2, 12), {"input_ids": make_batch(2, 12)["input_ids"]}, make_batch(2, 31)]
    return prove_batches("phi3", sp_size, batches, **changes)


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="frequencies of 5.17 are captured once more")
def test_frequencies_that_depend_on_the_length(world: World) -> None:
    """Of longrope: tensors that it keeps on its module are not the trace's."""
    assert_calls_exact(world.run(_prove_longrope, world.sp_size), 2)


def test_one_token_is_refused() -> None:
    model = transform(make_model("llama"), 4)
    with pytest.raises(CaptureError, match="expected sequences of two tokens or more"):
        model.surgery.prepare(input_ids=make_batch(2, 1)["input_ids"])


def test_odd_lengths_with_options(world: World) -> None:
    for results in zip(*world.run(_prove_otherwise, world.sp_size, 31), strict=True):
        assert_exact(list(results))


def test_double_precision(ranks: RankPool) -> None:
    assert_exact(ranks.run(prove, "llama", 4, dtype=torch.float64, length=33), torch.float64)


def _gathered(length: int) -> tuple[list[int], str]:
    """Shapes of logits gathered without and with their length; and what a tensor that is no shard is told."""
    model = transform(make_model("llama"), 4)
    logits = model(input_ids=make_batch(2, length)["input_ids"]).logits
    shapes = [*model.surgery.gather(logits).shape, *model.surgery.gather(logits, length=length).shape]
    try:
        message = str(model.surgery.gather(logits[:, : 1 + logits.shape[1] // 8 * model.surgery.axis.rank]))
    except InputError as error:
        message = str(error)
    restore(model)
    return shapes, message


def test_logits_are_made_whole(ranks: RankPool) -> None:
    for shapes, message in ranks.run(_gathered, 33):
        assert shapes == [2, 33, 99] * 2
        assert "expected the shards of one sequence, found 1, 2, 3, 4 tokens" in message
