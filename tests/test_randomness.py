"""Random numbers: apart on every rank over tokens and heads, alike where a value is whole, the same when recomputed."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForSpeechSeq2Seq

from surgery import SurgeryError, restore, transform
from surgery.verify.comparison import gradients_of, relative_error
from surgery.verify.ranks import RankPool
from tests.counting import CollectiveCounter
from tests.opaque_modules import make_opaque
from tests.random_modules import (
    NUM_HEADS,
    OVER_TOKENS,
    SLOT,
    ForAllTokens,
    Noisy,
    OpaqueDropout,
    OpaqueNoise,
    OverTokens,
    SkippedByPython,
    WithGenerator,
    kept_keys,
    make_attending,
    make_shown,
)
from tests.sampling import sampled
from tests.worlds import World
from tests.zoo import make_batch, make_model

SOME_DEVIATIONS = 5.0


class Steps(NamedTuple):
    """The whole logits of two steps, and the next draw of this rank's default generator."""

    first: Tensor
    second: Tensor
    after: float


def _run(model: Any, ids: Tensor, *seeds: tuple[int, ...]) -> list[Steps]:
    """Two steps for each choice of the ranks' seeds, in one capture."""
    found = []
    for by_rank in seeds:
        torch.manual_seed(by_rank[dist.get_rank()])
        first, second = (model.surgery.gather(model(input_ids=ids).logits.detach()) for _ in range(2))
        found.append(Steps(first, second, float(torch.rand(()))))
    restore(model)
    return found


def _shown(module: nn.Module, sp_size: int, *seeds: tuple[int, ...]) -> list[Steps]:
    ids = make_batch(8, 32, vocab_size=SLOT)["input_ids"]
    model = transform(make_shown(module).train(module.training), sp_size, example={"input_ids": ids})
    return _run(model, ids, *seeds)


def _attending(sp_size: int) -> list[Steps]:
    ids = torch.arange(16).expand(8, -1)
    model = transform(make_attending(0.25), sp_size, example={"input_ids": ids})
    return _run(model, ids, *[(3,) * sp_size] * 2)


def assert_in_step(results: list[list[Steps]]) -> None:
    """The default generators of ranks that were seeded alike are where those of the others are."""
    assert len({steps[-1].after for steps in results}) == 1


def assert_fair(drawn: list[Tensor], mean: float, variance: float) -> None:
    """Samples of one distribution, each with the mean and variance it should have, none correlated with another."""
    standard = [(sample.flatten().double() - mean) / variance**0.5 for sample in drawn]
    bound = SOME_DEVIATIONS / standard[0].numel() ** 0.5
    for index, one in enumerate(standard):
        assert abs(float(one.mean())) < bound
        assert abs(float((one**2).mean()) - 1) < bound * max(1.0, float((one**2).std()))
        for other in standard[:index]:
            assert abs(float((one * other).mean())) < bound


def assert_repeated(one: Steps, other: Steps) -> None:
    assert torch.equal(one.first, other.first) and torch.equal(one.second, other.second)


@pytest.mark.parametrize("is_training", sampled([True, False], {True}))
def test_over_tokens_ranks_draw_apart(world: World, is_training: bool) -> None:
    sp_size = world.sp_size
    results = world.run(_shown, OverTokens().train(is_training), sp_size, *[(3,) * sp_size] * 2)
    assert_in_step(results)
    steps, again = results[0]
    assert_repeated(steps, again)
    for index, (_, mean, variance) in enumerate(OVER_TOKENS.values()):
        slots = [step[..., SLOT * index :][..., :SLOT] for step in (steps.first, steps.second)]
        assert_fair([run for slot in slots for run in slot.chunk(sp_size, dim=1)], mean, variance)


@pytest.mark.parametrize("module_class", sampled([ForAllTokens, OpaqueNoise], {ForAllTokens}))
def test_whole_values_are_alike_whatever_the_seeds(world: World, module_class: type[nn.Module]) -> None:
    size = world.sp_size
    results = world.run(_shown, module_class(), size, tuple(range(1, size + 1)), (1,) * size)
    assert_in_step(results)
    (first, second, _), alike = results[0]
    assert torch.equal(first, first[:, :1].expand_as(first)), "one draw for the tokens of all ranks"
    assert float(first[0, 0].std()) > 0.1 and not torch.equal(first, second)
    assert torch.equal(alike.first, first), "rank 0's seed decides"


def test_attention_drops_apart(world: World) -> None:
    """For every head, on one rank or on several; in both layers; in both steps."""
    results = world.run(_attending, world.sp_size)
    assert_in_step(results)
    steps, again = results[0]
    assert_repeated(steps, again)
    patterns = [kept for step in (steps.first, steps.second) for layer in kept_keys(step) for kept in layer]
    assert len(patterns) == 2 * 2 * NUM_HEADS
    assert_fair(patterns, 0.75, 3 / 16)


def _encoded() -> Tensor:
    """What whisper's encoder makes of frames, of which every rank holds all, with every dropout that it has."""
    model = make_model("whisper", auto=AutoModelForSpeechSeq2Seq, attention_dropout=0.3, dropout=0.3)
    transform(model, 2)
    torch.manual_seed(dist.get_rank())
    features = torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40)
    found: Tensor = model(input_features=features, labels=make_batch(2, 16)["labels"]).encoder_last_hidden_state
    restore(model)
    return found.detach()


def test_attention_over_whole_values_drops_alike(pair: RankPool) -> None:
    assert torch.equal(*pair.run(_encoded))


def make_noisy(name: str) -> Any:
    """A model that draws in every layer. Of llama's one is opaque, and the other has every kind of draw."""
    if name == "mixtral":
        return make_model(name, attention_dropout=0.2, router_jitter_noise=0.2)
    model = make_model(name, num_hidden_layers=2, attention_dropout=0.2)
    torch.manual_seed(2)
    for layer, module_class in zip(model.model.layers, (OpaqueDropout, Noisy), strict=True):
        layer.mlp = module_class(layer.mlp)
    return model


Step = dict[str, Tensor]


def _step(model: Any, seed: int, run: Any = None) -> Step:
    """The loss and the gradients of one step from `seed`."""
    torch.manual_seed(seed)
    loss = (run if run is not None else model)(**make_batch(2, 32)).loss
    loss.backward()
    gradients = gradients_of(model, model.surgery.mpu.get_sequence_parallel_group())
    model.zero_grad()
    return {"loss": loss.detach(), **gradients}


def _distance(one: Step, other: Step) -> float:
    return max(relative_error(other[name], value, 1e-3) for name, value in one.items())


def _recomputed(name: str, sp_size: int) -> tuple[float, float, float, list[int]]:
    """How far from a first step are a second, one that recomputes, and one from another seed; bytes of all-reduces."""
    model = transform(make_noisy(name), sp_size)
    with CollectiveCounter() as counter, torch.no_grad():
        model(**make_batch(2, 32))
    first, again, other = (_step(model, seed) for seed in (5, 5, 6))
    model.gradient_checkpointing_enable()
    recomputed = _step(model, seed=5)
    restore(model)
    return *(_distance(first, step) for step in (again, recomputed, other)), counter.sizes_bytes["all_reduce"]


@pytest.mark.parametrize("name", sampled(["llama", "mixtral"], {"llama"}))
def test_recomputation_draws_again_what_it_drew(world: World, name: str) -> None:
    for again, recomputed, other, sent in world.run(_recomputed, name, world.sp_size):
        assert again == 0.0
        assert recomputed < 1e-5
        assert other > 1e-3, "another seed is another pattern"
        assert sent == ([8, 4] if name == "llama" else [4]), "a seed where ranks draw alike, and the loss"


def _compiled() -> tuple[float, float, float]:
    """How far from a step with hidden dropout are a compiled one, one that recomputes, and one after another."""
    torch._dynamo.reset()
    model = transform(make_model("gpt2", embd_pdrop=0.1, resid_pdrop=0.2), 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = _step(model, seed=5), _step(model, seed=6)
    found, next_found = _step(model, 5, compiled), _step(model, 6, compiled)
    model.gradient_checkpointing_enable()
    recomputed = _step(model, 5, compiled)
    restore(model)
    return _distance(first, found), _distance(second, next_found), _distance(first, recomputed)


def test_compiled_hidden_dropout_draws_the_same(pair: RankPool) -> None:
    for distances in pair.run(_compiled):
        assert max(distances) < 1e-5


DO_NOT_COMPILE = {
    "sdpa": partial(make_attending, 0.25),
    "uniform": partial(make_opaque, Noisy),
    "OpaqueDropout": partial(make_opaque, OpaqueDropout),
}


def _refused(name: str) -> str:
    torch._dynamo.reset()
    model = transform(DO_NOT_COMPILE[name](), 2)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        compiled(**make_batch(2, 32))
    except Exception as error:
        return str(error)
    finally:
        restore(model)
    return "no error"


@pytest.mark.parametrize("name", sampled(DO_NOT_COMPILE, {"sdpa"}))
def test_other_draws_do_not_compile(pair: RankPool, name: str) -> None:
    for message in pair.run(_refused, name):
        assert f"{name} draws random numbers" in message


def _moments(sp_size: int, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logits' means over many steps, sharded less whole, in standard errors; ratios of variances, also of sums."""
    model = make_model("gpt2", embd_pdrop=0.2, resid_pdrop=0.2, attn_pdrop=0.2)
    ids = make_batch(2, 16)["input_ids"]
    whole = copy.deepcopy(model)
    transform(model, sp_size, example={"input_ids": ids})
    torch.manual_seed(0)
    with torch.no_grad():
        expected = torch.stack([whole(input_ids=ids, use_cache=False).logits for _ in range(num_steps)])
        sharded = torch.stack([model(input_ids=ids).logits for _ in range(num_steps)])
        found = model.surgery.gather(sharded, dim=2)
    restore(model)
    error = ((found.var(0) + expected.var(0)) / num_steps) ** 0.5
    deviations = (found.mean(0) - expected.mean(0)) / error
    sums = [logits.flatten(1).sum(1) for logits in (found, expected)]
    return deviations, found.var(0) / expected.var(0), sums[0].var() / sums[1].var()


def test_many_draws_have_the_mean_of_the_unsharded_model(world: World) -> None:
    deviations, variances, of_sums = world.run(_moments, world.sp_size, 200)[0]
    assert float(deviations.abs().max()) < SOME_DEVIATIONS
    assert abs(float(variances.mean()) - 1) < 0.1
    assert 0.6 < float(of_sums) < 1.6, "of ranks that repeat a pattern, sums vary more"


def test_a_transform_leaves_the_generator_alone() -> None:
    model = make_opaque(OpaqueDropout)
    state = torch.get_rng_state()
    transform(model, 4)
    assert "shared_seed" in model.surgery.programs[0].code
    assert "seed" not in model.eval().surgery.prepare(**make_batch(2, 16)).code
    restore(model)
    assert torch.equal(torch.get_rng_state(), state)


def _skipped() -> tuple[list[float], list[float]]:
    """Losses of many steps in which a layer is skipped at random, and those of the model with and without it."""
    model = make_model("opt", layerdrop=0.25)
    batch = make_batch(2, 16)
    expected = [float(model.eval()(**batch).loss.detach())]
    (layer,) = model.model.decoder.layers
    model.model.decoder.layers = nn.ModuleList()
    expected.append(float(model(**batch).loss.detach()))
    model.model.decoder.layers = nn.ModuleList([layer])
    transform(model.train(), 2)
    torch.manual_seed(dist.get_rank())
    found = [float(model(**batch).loss.detach()) for _ in range(200)]
    restore(model)
    return found, expected


def test_a_branch_on_a_draw_is_taken_alike_and_as_often_as_it_should_be(pair: RankPool) -> None:
    (losses, (with_layer, without_layer)), (others, _) = pair.run(_skipped)
    assert losses == others
    skipped = [abs(loss - without_layer) < 1e-5 for loss in losses]
    assert all(is_skipped or abs(loss - with_layer) < 1e-5 for is_skipped, loss in zip(skipped, losses, strict=True))
    assert abs(sum(skipped) / 200 - 0.25) < SOME_DEVIATIONS * (0.25 * 0.75 / 200) ** 0.5


@pytest.mark.parametrize(
    ("module_class", "message"),
    [(SkippedByPython, "Python or numpy"), (WithGenerator, r"torch(\._C)?\.Generator")],
)
def test_other_generators_are_refused(module_class: type[nn.Module], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        transform(make_opaque(module_class), 4)
