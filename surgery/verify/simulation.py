"""All ranks in one process: a rewritten graph run by threads that meet where ranks would communicate.

    run_ranks(graph, size, inputs)    ->   [outputs of rank 0, outputs of rank 1, ...]
    run_model(model, batch)           ->   the same for a transformed model

Autograd sees one program: what the ranks' backwards leave in a shared input is added up, as the ranks' gradients are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.axis import Axis
from surgery.private import GroupName
from surgery.verify.staging import replaced_collectives

TIMEOUT_S = 60


def run_ranks(graph: fx.Graph, size: int, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Run a graph that was rewritten for any one rank on all of them, which are given the same inputs."""
    with simulated_ranks(size) as run:
        return run(lambda axis: _Rank(graph.owning_module or nn.Module(), graph, axis).run(*inputs))


def run_model(model: Any, batch: Mapping[str, Any]) -> list[Any]:
    """What a model that was transformed without a process group returns on each of its ranks, from one capture."""
    surgery = model.surgery
    call = surgery.bind(**batch)
    program = surgery.prepare_call(call)
    inputs = [call.tensors[tensor.name] for tensor in program.signature.tensors]
    with simulated_ranks(surgery.options.sp_size) as run:
        outputs = run(lambda axis: _Rank(model, program.graph, axis).run(*inputs))
    return [pytree.tree_unflatten(list(output), program.output_spec) for output in outputs]


class _Rank(fx.Interpreter):
    """Interprets a rewritten graph as one rank would, whichever rank it was rewritten for."""

    def __init__(self, owner: nn.Module, graph: fx.Graph, axis: Axis) -> None:
        super().__init__(owner, graph=graph)
        self.axis = axis

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, args, {**kwargs, "axis": self.axis} if "axis" in kwargs else kwargs)


class _Meeting:
    """Where the threads swap tensors: each hands in its own and leaves with everyone's."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.own = threading.local()
        self.size = size
        self.sent: list[Any] = [None] * size

    def swap(self, x: Any) -> list[Any]:
        self.sent[self.own.rank] = x
        self.barrier.wait()
        received = list(self.sent)
        self.barrier.wait()
        return received

    def all_gather_first_dim(self, x: Tensor, size: int, group_name: str) -> Tensor:
        return torch.cat(self.swap(x))

    def all_reduce_sum(self, x: Tensor, group_name: str) -> Tensor:
        return torch.stack(self.swap(x)).sum(0)

    def all_to_all_runs(self, x: Tensor, sent: Sequence[int], received: Sequence[int], group_name: str) -> Tensor:
        pieces = [theirs[self.own.rank] for theirs in self.swap(x.split(list(sent)))]
        assert [len(piece) for piece in pieces] == list(received)
        return torch.cat(pieces)

    def attend(self, rank: int, function: Callable[[Axis], Any]) -> Any:
        self.own.rank = rank
        try:
            return function(Axis(self.size, rank, GroupName("simulated")))
        except BaseException:
            self.barrier.abort()
            raise


@contextmanager
def simulated_ranks(size: int) -> Iterator[Callable[[Callable[[Axis], Any]], list[Any]]]:
    """Within the block, `run(function)` calls `function(axis)` for all ranks at once: [result of rank 0, ...]."""
    meeting = _Meeting(size)

    def run(function: Callable[[Axis], Any]) -> list[Any]:
        with ThreadPoolExecutor(max_workers=size) as threads:
            futures = [threads.submit(meeting.attend, rank, function) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    with replaced_collectives(lambda collective: getattr(meeting, collective.__name__)):
        yield run
