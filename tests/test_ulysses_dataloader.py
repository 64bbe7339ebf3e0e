"""The data loader adapter: which rank gets which slice of whose sample, and what travels."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from surgery import ConfigurationError
from surgery.axis import run_lengths
from surgery.ulysses import UlyssesSPDataLoaderAdapter
from surgery.verify.ranks import RankPool
from tests.refusals import refusal


def _sample(index: int) -> dict[str, Any]:
    """Token t of sample i is 100 i + t; samples differ in length, and every third label is ignored."""
    ids = 100 * index + torch.arange(8 + 3 * index)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids % 3 == 0, -100),
        "weights": torch.linspace(0, 1, len(ids), dtype=torch.float64),
        "is_prompt": ids % 2 == 0,
        "name": f"sample {index}",
    }


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    [sample] = samples
    batch = {name: value[None] if isinstance(value, Tensor) else value for name, value in sample.items()}
    return {**batch, "cu_seq_lens_q": torch.tensor([0, len(sample["input_ids"])], dtype=torch.int32)}


class Loader(DataLoader[Any]):
    """A loader over this rank's samples that remembers how many it gave, as a stateful one does."""

    def __init__(self, indices: list[int]) -> None:
        self.samples = [_sample(index) for index in indices]
        super().__init__(self.samples, batch_size=1, collate_fn=_collate)  # type: ignore[arg-type]
        self.start = 0

    def __iter__(self) -> Any:
        for sample in self.samples[self.start :]:
            self.start += 1
            yield _collate([sample])
        self.start = 0

    def state_dict(self) -> dict[str, int]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["start"]


def _adapter(dl: Any) -> UlyssesSPDataLoaderAdapter:
    group = dist.group.WORLD
    assert group is not None
    return UlyssesSPDataLoaderAdapter(dl, dist.get_rank(), group, dist.get_world_size(), "cpu")


def _iterate(owned: list[list[int]]) -> tuple[int, list[dict[str, Any]], list[str]]:
    adapter = _adapter(Loader(owned[dist.get_rank()]))
    first = list(adapter)
    second = [batch["name"] for batch in adapter]
    return len(adapter), first, second


def _expected(index: int, rank: int, size: int) -> dict[str, Tensor]:
    sample = _sample(index)
    runs = run_lengths(len(sample["input_ids"]), size)
    own = slice(sum(runs[:rank]), sum(runs[: rank + 1]))
    shifted = torch.cat([sample["labels"][1:], torch.tensor([-100])])
    return {
        "input_ids": sample["input_ids"][own],
        "position_ids": torch.arange(len(sample["input_ids"]))[own],
        "shift_labels": shifted[own],
        "weights": sample["weights"][own],
        "is_prompt": sample["is_prompt"][own],
    }


OWNED = {
    "as many each": ([[0, 4], [1, 5], [2, 6], [3, 7]], [0, 1, 2, 3, 4, 5, 6, 7]),
    "one has more": ([[0, 4, 6], [1], [2, 5], [3]], [0, 1, 2, 3, 4, 5, 6]),
}


@pytest.mark.parametrize("owned", OWNED)
def test_all_ranks_get_a_slice_of_every_sample(ranks: RankPool, owned: str) -> None:
    per_rank, order = OWNED[owned]
    for rank, (length, batches, again) in enumerate(ranks.run(_iterate, per_rank)):
        assert length == 4 * len(per_rank[rank])
        assert [batch["name"] for batch in batches] == again == [f"sample {index}" for index in order]
        for index, batch in zip(order, batches, strict=True):
            assert "labels" not in batch
            assert batch["cu_seq_lens_q"].tolist() == [0, 8 + 3 * index], "what has no tokens goes to all ranks whole"
            for name, expected in _expected(index, rank, 4).items():
                assert batch[name].dtype == expected.dtype
                assert torch.equal(batch[name][0], expected), f"{name} of sample {index} on rank {rank}"


def _bytes_sent() -> tuple[int, int]:
    sent: list[int] = []
    original = dist.all_to_all_single

    def count(received: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(given.numel())
        return original(received, given, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", count):
        next(_adapter(Loader([0])))
    return len(sent), sum(sent)


def test_slices_are_all_that_travels(ranks: RankPool) -> None:
    tokens, bytes_per_token = 8, 8 + 8 + 8 + 8 + 1  # ids, positions, labels, weights, is_prompt
    assert ranks.run(_bytes_sent) == [(1, tokens * bytes_per_token)] * 4


def _resume(consumed: int) -> tuple[dict[str, int], list[str], list[str]]:
    owned = [[0, 4], [1, 5], [2, 6], [3, 7]][dist.get_rank()]
    adapter = _adapter(Loader(owned))
    for _ in range(consumed):
        next(adapter)
    state = adapter.state_dict()
    rest = [batch["name"] for batch in adapter]
    resumed = _adapter(Loader(owned))
    resumed.load_state_dict(state)
    return state, rest, [batch["name"] for batch in resumed]


@pytest.mark.parametrize("consumed", [0, 2, 4, 5])
def test_state_is_the_loaders_and_resumes_anywhere(ranks: RankPool, consumed: int) -> None:
    for state, rest, resumed in ranks.run(_resume, consumed):
        assert rest == resumed
        assert len(rest) == 8 - consumed
        if consumed % 4 == 0:
            assert state == {"start": consumed // 4}


def _attributes() -> list[Any]:
    dl: DataLoader[Any] = DataLoader(range(8), sampler=DistributedSampler(range(8)))  # type: ignore[arg-type]
    adapter = _adapter(dl)
    return [adapter.sampler is dl.sampler, adapter.batch_size, hasattr(adapter, "state_dict"), adapter.dl is dl]


def test_attributes_are_the_loaders(ranks: RankPool) -> None:
    assert ranks.run(_attributes) == [[True, 1, False, True]] * 4


def _bad_samples() -> dict[str, str]:
    rank = dist.get_rank()
    short = {"input_ids": torch.zeros(1, 8), "labels": torch.zeros(1, 7 if rank == 1 else 8)}
    found = {
        "labels": refusal(lambda: next(_adapter([short]))),
        "no ids": refusal(lambda: next(_adapter([{"x": 1}]))),
    }
    try:
        UlyssesSPDataLoaderAdapter([], 0, dist.group.WORLD, 1, "cpu")  # type: ignore[arg-type]
    except ConfigurationError as error:
        found["size"] = str(error)
    return found


def test_bad_samples_are_refused_on_all_ranks(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(_bad_samples)):
        assert "the sample of rank 1: shift_labels (1, 7) and input_ids (1, 8)" in found["labels"]
        assert "expected input_ids [B, S]" in found["no ids"]
        assert f"expected sp_rank {rank} of sp_world_size 4" in found["size"]
