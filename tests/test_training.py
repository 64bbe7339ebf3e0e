"""Training as a user does it: DDP over dp x sp, the mpu, eval bypass, optimizers, parameters replaced afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache

from surgery import restore, transform
from surgery.verify.comparison import TOLERANCE, compare, gradients_of, relative_error
from surgery.verify.ranks import RankPool
from tests.proof import assert_calls_exact, assert_exact, prove_calls
from tests.worlds import World
from tests.zoo import CACHE, make_batch, make_model

TOLERANCE_F32 = TOLERANCE[torch.float32]


def _worst_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(relative_error(found[name], expected[name], 1e-6) for name in expected)


def _ddp_gradients() -> float:
    """dp 2 x sp 2 under DDP against one process on the whole batch, the mean taken over all its labels."""
    batch = make_batch(4, 32)
    count = int((batch["labels"][:, 1:] != -100).sum())
    reference = make_model("llama")
    reference(**batch, num_items_in_batch=count).loss.backward()
    model = transform(make_model("llama"), sp_size=2)
    mpu = model.surgery.mpu
    rows = slice(2 * mpu.get_data_parallel_rank(), 2 * mpu.get_data_parallel_rank() + 2)
    wrapped = DistributedDataParallel(model)
    replicas = mpu.get_data_parallel_world_size()
    mine = {name: tensor[rows] for name, tensor in batch.items()}
    wrapped(**mine, num_items_in_batch=count / replicas).loss.backward()
    return _worst_gradient(gradients_of(model), gradients_of(reference))


def test_ddp_over_dp_and_sp(ranks: RankPool) -> None:
    assert max(ranks.run(_ddp_gradients)) <= TOLERANCE_F32


def _mpu_facts(sp_size: int) -> dict[str, Any]:
    model = transform(make_model("llama"), sp_size)
    mpu = model.surgery.mpu
    facts = {
        "sp": (mpu.get_sequence_parallel_rank(), mpu.get_sequence_parallel_world_size()),
        "dp": (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()),
        "all": (mpu.get_sequence_data_parallel_rank(), mpu.get_sequence_data_parallel_world_size()),
        "mp": (
            mpu.get_model_parallel_rank(),
            mpu.get_model_parallel_world_size(),
            mpu.get_model_parallel_group().size(),
        ),
        "ranks": dist.get_process_group_ranks(mpu.get_sequence_parallel_group()),
    }
    restore(model)
    return facts


def test_mpu_is_a_grid_with_contiguous_sequence_ranks(ranks: RankPool) -> None:
    facts = ranks.run(_mpu_facts, 2)
    assert [fact["sp"] for fact in facts] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [fact["dp"] for fact in facts] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [fact["all"] for fact in facts] == [(rank, 4) for rank in range(4)]
    assert [fact["mp"] for fact in facts] == [(0, 1, 1)] * 4
    assert [fact["ranks"] for fact in facts] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def _eval_bypass(sp_size: int) -> tuple[bool, int]:
    from tests.counting import CollectiveCounter

    model = make_model("llama").eval()
    batch = make_batch(2, 30)
    expected = copy.deepcopy(model)(**batch)
    transform(model, sp_size, disable_in_eval=True)
    with CollectiveCounter() as counter, torch.no_grad():
        found = model(**batch)
    is_equal = torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    restore(model)
    return is_equal, counter.total


def test_eval_bypass_is_the_original_bit_for_bit(world: World) -> None:
    assert world.run(_eval_bypass, world.sp_size) == [(True, 0)] * world.sp_size


def _train_steps(transformed: bool) -> list[float]:
    model = make_model("qwen2", tie_word_embeddings=True)
    if transformed:
        transform(model, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(4):
        loss = model(**make_batch(2, 32 + 4 * step, seed=step)).loss
        loss.backward()
        if transformed:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                assert parameter.grad is not None
                parameter.grad /= 4
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    if transformed:
        assert len(model.surgery.programs) == 1, "another length must not capture again"
        restore(model)
    return losses


def test_training_steps_follow_the_unsharded_ones(ranks: RankPool) -> None:
    expected = ranks.run(_train_steps, False)[0]
    for losses in ranks.run(_train_steps, True):
        assert losses == pytest.approx(expected, rel=1e-5)


class LowRank(nn.Module):
    """A LoRA-style wrapped linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _with_low_rank() -> nn.Module:
    model = make_model("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
    return model


def _prove_low_rank(sp_size: int) -> dict[str, float]:
    torch.manual_seed(3)
    return compare(_with_low_rank(), sp_size, make_batch(2, 32))


def test_low_rank_adapters(world: World) -> None:
    assert_exact(world.run(_prove_low_rank, world.sp_size))


def _replaced_after_transform(sp_size: int) -> list[float]:
    """Errors of the loss after a dtype move, a swapped head of the same shape, and one of another kind."""
    model = transform(make_model("llama"), sp_size)
    batch = make_batch(2, 32)
    model(**batch)
    torch.manual_seed(4)
    errors = []
    for change in (_to_double, _swap_head, _adapt_head, _resize):
        change(model)
        restored_forward = copy.deepcopy(model)
        restored_forward.__dict__.pop("forward")
        errors.append(relative_error(model(**batch).loss, restored_forward(**batch).loss))
    restore(model)
    return errors


def _to_double(model: Any) -> None:
    model.double()


def _swap_head(model: Any) -> None:
    model.lm_head = nn.Linear(64, 99, bias=False, dtype=torch.float64)


def _adapt_head(model: Any) -> None:
    model.lm_head = LowRank(model.lm_head).double()


def _resize(model: Any) -> None:
    model.lm_head = nn.Linear(64, 120, bias=False, dtype=torch.float64)
    model.config.vocab_size = 120


def test_parameters_replaced_after_the_transform(world: World) -> None:
    for errors in world.run(_replaced_after_transform, world.sp_size):
        assert max(errors) <= TOLERANCE_F32


def _decode(model: Any, ids: Tensor) -> Tensor:
    """The logits of the last token, which a cache is carried to that is empty at first."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], **{CACHE: cache})
    logits: Tensor = model(input_ids=ids[:, -1:], **{CACHE: cache}).logits
    return logits


def _generates(sp_size: int) -> tuple[bool, bool, bool]:
    model = make_model("llama").eval()
    ids = make_batch(1, 7)["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    decoded = _decode(model, ids)
    transform(model, sp_size)
    found = model.generate(ids, max_new_tokens=5, do_sample=False)
    uncached = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    is_decoded = torch.equal(_decode(model, ids), decoded)
    restore(model)
    return torch.equal(found, expected), torch.equal(uncached, expected), is_decoded


def test_generate_is_untouched(world: World) -> None:
    assert world.run(_generates, world.sp_size) == [(True, True, True)] * world.sp_size


def _leaves_no_trace(sp_size: int, directory: str) -> list[bool]:
    from transformers import AutoModelForCausalLM

    model, original = make_model("llama"), make_model("llama")
    transform(model, sp_size)
    same_keys = list(model.state_dict()) == list(original.state_dict())
    if dist.get_rank() == 0:
        model.save_pretrained(directory)
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    same_weights = all(torch.equal(p, q) for p, q in zip(loaded.parameters(), original.parameters(), strict=True))
    restore(model)
    batch = make_batch(2, 31)
    same_loss = torch.equal(model(**batch).loss, original(**batch).loss)
    return [same_keys, same_weights, same_loss, type(model) is type(original), "surgery" not in model.__dict__]


def test_state_dict_saving_and_restore(world: World, tmp_path: Any) -> None:
    assert world.run(_leaves_no_trace, world.sp_size, str(tmp_path)) == [[True] * 5] * world.sp_size


def _two_models_and_a_teacher() -> list[float]:
    """Two transformed models of different sp_size and an untouched one, side by side in one process."""
    batch = make_batch(2, 32)
    first, second, teacher = (make_model(name) for name in ("llama", "qwen2", "llama"))
    expected = [float(copy.deepcopy(model)(**batch).loss) for model in (first, second, teacher)]
    transform(first, 2)
    transform(second, 4)
    found = [float(model(**batch).loss) for model in (first, second, teacher)]
    restore(first)
    restore(second)
    return [abs(a - b) / b for a, b in zip(found, expected, strict=True)]


def test_two_models_and_an_untouched_one(ranks: RankPool) -> None:
    for errors in ranks.run(_two_models_and_a_teacher):
        assert max(errors[:2]) <= TOLERANCE_F32
        assert errors[2] == 0.0


class Branching(nn.Module):
    """A layer that reads a setting of its own, and that treats a batch of one differently."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.alpha = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x * self.alpha if x.shape[0] > 1 else x * 3)


def _branches(sp_size: int) -> list[float]:
    """Errors of the loss for a batch of two, of one, and after the setting changed."""
    model = make_model("llama")
    layer = model.model.layers[0]
    layer.mlp = Branching(layer.mlp)
    reference = copy.deepcopy(model)
    transform(model, sp_size)
    errors = []
    for batch_size, alpha in ((2, 1.0), (1, 1.0), (2, 5.0)):
        layer.mlp.alpha = reference.model.layers[0].mlp.alpha = alpha
        batch = make_batch(batch_size, 32)
        errors.append(relative_error(model(**batch).loss, reference(**batch).loss))
    restore(model)
    return errors


def test_branches_and_settings_are_followed(world: World) -> None:
    for errors in world.run(_branches, world.sp_size):
        assert max(errors) <= TOLERANCE_F32


def _smoothed(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0, **kwargs: Any) -> torch.Tensor:
    targets = labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, label_smoothing=smoothing)


def _weighted(weight: float) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: weight * _smoothed(*args, **kwargs)


def _set_loss(function: Callable[..., torch.Tensor], model: Any) -> None:
    model.loss_function = function


def _prove_loss_functions(sp_size: int) -> Any:
    functions = (_smoothed, partial(_smoothed, smoothing=0.2), _weighted(0.5), _weighted(2.0))
    calls = [(partial(_set_loss, function), make_batch(2, 32)) for function in functions]
    return prove_calls(make_model("llama"), sp_size, calls)


def test_loss_functions_are_followed(world: World) -> None:
    """Given after the transform, and others of the same code; the example's was captured with the model's own."""
    assert_calls_exact(world.run(_prove_loss_functions, world.sp_size), 5)


def _address(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().data_ptr()
    return tensor


def test_the_first_call_under_saved_tensor_hooks() -> None:
    """Offloading, or counting, what is saved must not meet the tensors without memory of a trace."""
    model = transform(make_model("llama"), 2)
    with torch.autograd.graph.saved_tensors_hooks(_address, _address):
        model.surgery.prepare(**make_batch(1, 32))
    assert len(model.surgery.programs) == 2
