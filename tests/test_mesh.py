"""Process groups that a user has already: meshes with an "sp" dimension, and mpus in the manner of Megatron."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from surgery import restore, transform
from surgery.verify.comparison import compare
from surgery.verify.ranks import RankPool
from tests.proof import assert_exact
from tests.refusals import refusal
from tests.zoo import make_batch, make_model

MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "sp alone": ((4,), ("sp",)),
    "dp, sp": ((2, 2), ("dp", "sp")),
    "sp first": ((2, 2), ("sp", "dp")),
    "other axes": ((2, 1, 2), ("pp", "tp", "sp")),
}


def _mesh(name: str) -> DeviceMesh:
    sizes, names = MESHES[name]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _prove_mesh(name: str) -> tuple[dict[str, float], bool]:
    mesh = _mesh(name)
    errors = compare(make_model("llama"), mesh["sp"].size(), make_batch(2, 32), mesh=mesh)
    return errors, dist.get_world_size(mesh.get_group("sp")) == mesh["sp"].size()


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_of_ones_own(ranks: RankPool, name: str) -> None:
    errors, is_open = zip(*ranks.run(_prove_mesh, name), strict=True)
    assert_exact(list(errors))
    assert all(is_open), "restore() must leave the caller's groups open"


def _crossed_mpu() -> Any:
    """Ranks 0 and 2 share a sequence, and so do 1 and 3: what no default would make."""
    mesh = torch.arange(4).view(2, 2)
    groups = {
        name: dist.new_subgroups_by_enumeration(rows.tolist())[0] for name, rows in (("sp", mesh.T), ("dp", mesh))
    }
    sequence, data = groups["sp"], groups["dp"]
    return SimpleNamespace(
        get_sequence_parallel_group=lambda: sequence,
        get_sequence_parallel_world_size=sequence.size,
        get_sequence_parallel_rank=sequence.rank,
        get_data_parallel_group=lambda: data,
    )


def _prove_mpu() -> tuple[dict[str, float], list[int]]:
    mpu = _crossed_mpu()
    errors = compare(make_model("llama"), 2, make_batch(2, 32), mpu=mpu)
    return errors, dist.get_process_group_ranks(mpu.get_sequence_parallel_group())


def test_an_mpu_of_ones_own(ranks: RankPool) -> None:
    errors, members = zip(*ranks.run(_prove_mpu), strict=True)
    assert_exact(list(errors))
    assert list(members) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def _shared_mpu() -> list[Any]:
    """One model's mpu given to another, which is restored first."""
    first = transform(make_model("llama"), 2)
    second = transform(make_model("qwen2"), 2, mpu=first.surgery.mpu)
    batch = make_batch(2, 32)
    facts: list[Any] = [second.surgery.mpu.get_data_parallel_world_size()]
    restore(second)
    facts.append(bool(torch.isfinite(first(**batch).loss)))
    restore(first)
    return facts


def test_another_models_mpu(ranks: RankPool) -> None:
    assert ranks.run(_shared_mpu) == [[2, True]] * 4


def _mesh_facts() -> list[Any]:
    alone, other = (
        transform(make_model("llama"), size, mesh=_mesh(n)) for n, size in (("sp alone", 4), ("other axes", 2))
    )
    mpu = alone.surgery.mpu
    return [
        (mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()),
        mpu.get_sequence_data_parallel_world_size(),
        refusal(other.surgery.mpu.get_data_parallel_group),
        refusal(other.surgery.mpu.get_sequence_data_parallel_group),
        "sp 2, in a mesh with other dimensions" in other.surgery.report().to_text(),
    ]


@pytest.mark.usefixtures("fake_ranks")
def test_what_a_mesh_does_not_say_is_an_error() -> None:
    data, world_size, no_data, no_everyone, is_reported = _mesh_facts()
    assert data == (1, 0)
    assert world_size == 4
    assert "Expected a dimension 'dp' beside 'sp'" in no_data
    assert "not 'dp' x 'sp' over all ranks" in no_everyone
    assert is_reported


def _answers_to_deepspeed() -> tuple[int, int]:
    """What the engine is told, and what a script is, that both ask through DeepSpeed's record of groups."""
    model = transform(make_model("llama"), 2)
    record: dict[str, Any] = {"__name__": "deepspeed.utils.groups", "mpu": model.surgery.mpu}
    exec("def size():\n    return mpu.get_sequence_parallel_world_size()", record)
    engine: dict[str, Any] = {"__name__": "deepspeed.runtime.engine", "size": record["size"]}
    exec("def ask():\n    return size()", engine)
    answers = engine["ask"](), record["size"]()
    restore(model)
    return answers


def test_a_script_may_ask_through_deepspeed(pair: RankPool) -> None:
    assert pair.run(_answers_to_deepspeed) == [(1, 2)] * 2


class _Uninitialized:
    def get_sequence_parallel_group(self) -> None:
        raise AssertionError("sequence parallel group is not initialized")


def _bad_groups() -> dict[str, str]:
    model = make_model("llama")
    mesh = _mesh("dp, sp")
    found = {
        "size": refusal(lambda: transform(model, 4, mesh=mesh)),
        "names": refusal(lambda: transform(model, 2, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))),
        "both": refusal(lambda: transform(model, 2, mesh=mesh, mpu=mesh)),
        "no mpu": refusal(lambda: transform(model, 2, mpu="sp")),
        "no group": refusal(lambda: transform(model, 2, mpu=SimpleNamespace(get_sequence_parallel_group=lambda: 3))),
        "uninitialized": refusal(lambda: transform(model, 2, mpu=_Uninitialized())),
        "then": refusal(lambda: transform(model, 2, mpu=mesh)),
    }
    restore(model)
    return found


@pytest.mark.usefixtures("fake_ranks")
def test_bad_groups() -> None:
    found = _bad_groups()
    assert "the mesh has 2 ranks in 'sp', but sp_size is 4" in found["size"]
    assert "expected a mesh with a dimension 'sp'" in found["names"]
    assert "expected a mesh or an mpu, found both" in found["both"]
    assert "found str" in found["no mpu"]
    assert "to be a process group that this rank is in, found 3" in found["no group"]
    assert "Initialize its groups first" in found["uninitialized"]
    assert found["then"] == "no error"
    assert all(text.startswith("ConfigurationError") for name, text in found.items() if name != "then")
