"""Real ranks on one machine: processes joined by gloo, started once and kept, that run functions sent to them.

    pool.run(function, *args)      ->   [result of rank 0, result of rank 1, ...]
    pool.stream(generator, *args)  ->   the same for each value that it yields, as they come

A world of four serves both sizes: sp_size 4, and sp_size 2 as a grid of dp 2 x sp 2.
"""

from __future__ import annotations

import inspect
import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, ForkServerContext, SpawnContext
from typing import Any

import torch
import torch.distributed as dist

from surgery.errors import SurgeryError, in_one_line

TIMEOUT_S = 600
GRACE_S = 60
"""How much longer the others have once a rank has failed."""
END = "no more values"
"""What a rank sends behind the last value of a stream, and is sent when its world is closed."""
ProcessContext = ForkServerContext | SpawnContext | ForkContext
PRELOADED = ["torch", "transformers", "transformers.exporters", "surgery"]


class RanksLostError(Exception):
    """A rank died or hangs, so that the others wait for it."""


@dataclass(frozen=True)
class Failure:
    """What a rank raised: the error in one line, and the whole traceback."""

    error: str
    traceback: str
    is_refusal: bool

    def __str__(self) -> str:
        return f"{self.error}\n{self.traceback}"


Answer = tuple[Failure | None, Any]
"""What a rank sends: its failure, or none and its result."""


class RanksFailedError(AssertionError):
    """Ranks raised, and all have answered. `refusal`: the message of the first that raised an error of this package."""

    def __init__(self, failures: dict[int, Failure]) -> None:
        super().__init__("\n".join(f"rank {rank}: {failure}" for rank, failure in failures.items()))
        self.refusal = next((failure.error for failure in failures.values() if failure.is_refusal), None)


class RankPool:
    """Processes that each hold one rank of a gloo world; a single one is alone, without a process group.

    `given`: the first arguments of every call, which are not pickled where the `context` is that of forks. `has_pools`:
    the processes may start pools. They are no daemons then: the interpreter waits at its end for those not closed.
    """

    def __init__(
        self,
        world_size: int,
        timeout_s: float = TIMEOUT_S,
        context: ProcessContext | None = None,
        *,
        given: tuple[Any, ...] = (),
        has_pools: bool = False,
    ) -> None:
        self.timeout_s = timeout_s
        self.is_lost = False
        context = context if context is not None else _context()
        self._directory = tempfile.TemporaryDirectory(prefix="surgery-ranks-")
        store = os.path.join(self._directory.name, "store")
        pairs = [context.Pipe() for _ in range(world_size)]
        self._pipes = [ours for ours, _ in pairs]
        inherited = pairs if context.get_start_method() == "fork" else []
        self._processes = [
            context.Process(
                target=_serve, args=(rank, world_size, store, theirs, given, inherited), daemon=not has_pools
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function` on every rank; raises `RanksFailedError` with the tracebacks of those that fail.

        Raises `RanksLostError` where a rank dies, or does not answer in time, as when it waits for one that failed: the
        world can only be closed then.
        """
        self._send((function, args, kwargs))
        return self._answers()

    def stream(self, generator: Callable[..., Iterator[Any]], *args: Any) -> Iterator[list[Any]]:
        """What `generator` yields on every rank, step by step: no rank goes on before all have answered."""
        self._send((generator, args, {}))
        while (answers := self._answers()) != [END] * len(self._pipes):
            yield answers
            self._send(None)

    def _send(self, message: Any) -> None:
        if self.is_lost:
            raise RanksLostError("a rank was lost before: the others may still wait for it")
        for pipe in self._pipes:
            pipe.send(message)

    def _answers(self) -> list[Any]:
        answers = self._receive_all()
        failures = {rank: failure for rank, (failure, _) in sorted(answers.items()) if failure is not None}
        if len(answers) < len(self._pipes):
            missing = [rank for rank in range(len(self._pipes)) if rank not in answers]
            self.is_lost = True
            waited = f"{GRACE_S} s of another's failure" if failures else f"{self.timeout_s:.0f} s"
            raise RanksLostError(f"ranks {missing} did not answer within {waited}\n{RanksFailedError(failures)}")
        if failures:
            raise RanksFailedError(failures)
        return [answers[rank][1] for rank in range(len(self._pipes))]

    def _receive_all(self) -> dict[int, Answer]:
        """What the ranks answer within the time they have, which is short once one has failed: the others may wait."""
        answers: dict[int, Answer] = {}
        deadline_s = time.monotonic() + self.timeout_s
        while len(answers) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(waiting, max(deadline_s - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                answers[waiting[pipe]] = self._receive(waiting[pipe])
            if any(failure is not None for failure, _ in answers.values()):
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        return answers

    def _receive(self, rank: int) -> Answer:
        try:
            answer: Answer = self._pipes[rank].recv()
        except (EOFError, ConnectionError) as error:
            self.is_lost = True
            raise RanksLostError(f"rank {rank} died") from error
        return answer

    def close(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(END)
            pipe.close()
        for process in self._processes:
            process.join(timeout=2)
        self.kill()
        self._directory.cleanup()

    def kill(self) -> None:
        """End the processes now: whoever waits for their answers is told that they died."""
        for process in self._processes:
            process.kill()
            process.join()


def _context() -> ForkServerContext | SpawnContext:
    """Processes forked from one that has imported everything; but new ones where there is a GPU.

    What is forked from a process that has looked at the GPU cannot use it, and to import flash-attn is to look. Ranks
    that compute on the CPU start as slowly there.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _serve(
    rank: int,
    world_size: int,
    store: str,
    pipe: Connection,
    given: tuple[Any, ...],
    inherited: list[tuple[Connection, Connection]],
) -> None:
    """Run what comes through `pipe`. A pipe ends when nobody holds its other end: a fork lets go of all but its own."""
    for end in itertools.chain(*inherited):
        if end is not pipe:
            end.close()
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (message := _next_message(pipe)) != END:
        function, args, kwargs = message
        try:
            result = function(*given, *args, **kwargs)
            if inspect.isgenerator(result):
                for value in result:
                    pipe.send((None, value))
                    if _next_message(pipe) == END:
                        return
                result = END
            pipe.send((None, result))
        except BaseException as error:
            failure = Failure(in_one_line(error), traceback.format_exc(), isinstance(error, SurgeryError))
            pipe.send((failure, None))


def _next_message(pipe: Connection) -> Any:
    """What the rank is to do next; the end where the process that started it is gone."""
    try:
        return pipe.recv()
    except EOFError:
        return END
