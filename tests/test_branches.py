"""Branches on what is in the data: a graph for each side that calls take, chosen by the data, alike on all ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import restore, transform
from surgery.capture.branches import OtherBranchError
from surgery.verify.comparison import run_sharded, run_whole
from surgery.verify.ranks import RankPool
from tests.proof import assert_exact
from tests.worlds import World
from tests.zoo import make_batch, make_model

RARE = 7
"""A token; batches with it take the other side."""


class Asking(nn.Module):
    """A decoder that asks twice of its ids, and asserts something of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        assert (input_ids >= 0).all().item(), "negative ids"
        embeds = self.model.get_input_embeddings()(input_ids)
        if (input_ids == RARE).any():
            embeds = embeds * 2
        if (input_ids == RARE + 1).any():
            embeds = embeds.flip(1)
        return self.model(inputs_embeds=embeds, labels=labels)


def _batch(*present: int) -> dict[str, Tensor]:
    batch = make_batch(2, 32)
    ids = batch["input_ids"]
    ids[(ids == RARE) | (ids == RARE + 1)] = 3
    for place, token in enumerate(present):
        ids[1, 20 + place] = token
    return batch


def _prove_sides(sp_size: int) -> tuple[list[dict[str, float]], list[tuple[bool, ...]]]:
    whole = Asking(make_model("llama"))
    twin: Any = transform(copy.deepcopy(whole), sp_size, example=_batch())
    errors = []
    for present in ((), (RARE,), (RARE, RARE + 1), (RARE,)):
        batch = _batch(*present)
        whole.zero_grad()
        twin.zero_grad()
        errors.append(run_sharded(twin, run_whole(whole, batch), batch))
    sides = [program.sides for program in twin.surgery.programs]
    restore(twin)
    return errors, sides


def test_each_side_gets_a_graph_of_its_own(world: World) -> None:
    found = world.run(_prove_sides, world.sp_size)
    for errors in zip(*(errors for errors, _ in found), strict=True):
        assert_exact(list(errors))
    for _, sides in found:
        assert sides == [(True, False, False), (True, True, False), (True, True, True)]


def _take_the_other_side_compiled() -> str:
    model = transform(Asking(make_model("llama")), 2)
    compiled: Any = torch.compile(model, backend="eager")
    compiled(**_batch())
    with pytest.raises(OtherBranchError) as caught:
        compiled(**_batch(RARE))
    restore(model)
    return str(caught.value)


def test_a_compiled_graph_refuses_the_other_side(pair: RankPool) -> None:
    assert all("Call the model on such data uncompiled" in text for text in pair.run(_take_the_other_side_compiled))


def test_the_report_says_where_data_decide() -> None:
    model = transform(Asking(make_model("llama")), 2)
    record = next(row for row in model.surgery.report().summary.passes if row.name == "call-opaque-modules")
    assert [row.first.reason.split(",")[0] for row in record.skips] == ["asks what is in the data"] * 3
