"""A trial: one tiny model, one kind of input, whole and on P ranks, real or simulated; what came of it is its outcome.

exact        loss, outputs and every gradient within the tolerance
gathered     exact too, with operations that every rank runs whole: `cost` names them
refused      transform, or the call, said no with an error of ours: `reason`
failed       it raised any other error, or a rank was lost: `reason`
unrunnable   the unsharded model cannot run on this input either: `reason`
wrong        off by `error`, most of all `where`
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from surgery.api import restore, transform
from surgery.errors import SurgeryError, in_one_line
from surgery.verify.batches import Batch, is_applicable, make_batch
from surgery.verify.comparison import (
    TOLERANCE,
    Reference,
    float_is_double,
    run_sharded,
    run_simulated,
    run_whole,
    worst,
)
from surgery.verify.staging import staged_through_host

EXACT, GATHERED, REFUSED, FAILED = "exact", "gathered", "refused", "failed"
UNRUNNABLE, WRONG = "unrunnable", "wrong"
FINE = (EXACT, GATHERED)
NOISE = 0.05
MakeModel = Callable[[PreTrainedConfig], nn.Module]
Run = Callable[[Any, Reference, Batch], dict[str, float]]
"""Forward and backward of a transformed model on its ranks, whatever these are: the errors."""


@dataclass(frozen=True)
class Outcome:
    """What came of one trial; `error` is the worst relative one, of the value called `where`."""

    kind: str
    verdict: str
    reason: str = ""
    error: float | None = None
    where: str = ""
    cost: str = ""
    elapsed_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_model(
    make: MakeModel,
    config: PreTrainedConfig,
    sp_size: int,
    kinds: Sequence[str],
    device: str = "cpu",
    run: Run | None = None,
) -> Iterator[Outcome]:
    """The outcome of each of `kinds`, as they come.

    `run`: on which ranks. By default this process is one of them, and the others call this alike; where there is no
    process group, they are simulated.
    """
    try:
        model = build(make, config).to(device)
    except Exception as error:
        yield from (Outcome(kind, UNRUNNABLE, in_one_line(error)) for kind in kinds)
        return
    if run is None:
        run = run_sharded if dist.is_initialized() else run_simulated
    is_shared = dist.is_initialized() and device != "cpu"
    with Twins(model, config, sp_size, run) as twins, staged_through_host() if is_shared else nullcontext():
        yield from (try_kind(twins, kind) for kind in kinds)


def build(make: MakeModel, config: PreTrainedConfig) -> nn.Module:
    """A model with random weights from a fixed seed, also where the class would start from zeros or ones."""
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE)
    return model.train()


class Twins:
    """A model and its transformed twin, which all kinds of input share: a signature is captured once.

    A `twin` that is given is transformed already, and restored by who gives it.
    """

    def __init__(self, model: nn.Module, config: PreTrainedConfig, sp_size: int, run: Run, twin: Any = None) -> None:
        self.model, self.config, self.sp_size, self.run = model, config, sp_size, run
        self._twin = twin
        self._errors: dict[frozenset[str], Exception] = {}
        self._closing = ExitStack()

    def __enter__(self) -> Twins:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        return next(parameter.device for parameter in self.model.parameters())

    def transformed(self, batch: Batch) -> Any:
        """The twin, without gradients. Raises what `transform` did, with this `batch` or one that passes the same."""
        if self._twin is None:
            self._twin = self._transform(batch)
        self._twin.zero_grad()
        return self._twin

    def _transform(self, batch: Batch) -> Any:
        passed = frozenset(batch)
        if passed in self._errors:
            raise self._errors[passed].with_traceback(None)
        twin = copy.deepcopy(self.model)
        try:
            transform(twin, self.sp_size, example=batch)
        except Exception as error:
            self._errors[passed] = error
            raise
        self._closing.callback(restore, twin)
        return twin

    @functools.cached_property
    def in_float64(self) -> Twins:
        """Copies of both: the twin's captures begin with what those in float32 found out about the model."""
        model, twin = _in_float64(self.model), _in_float64(self._twin)
        self._closing.callback(restore, twin)
        return self._closing.enter_context(Twins(model, self.config, self.sp_size, self.run, twin))


def _in_float64(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]  # grouped_mm has no float64
    return twin


def try_kind(twins: Twins, kind: str) -> Outcome:
    """One trial in float32; what looks wrong there is measured again in float64, which tells errors from rounding."""
    started = time.perf_counter()
    outcome = _trial(twins, kind)
    if outcome.verdict == WRONG and outcome.error is not None:
        with float_is_double():
            again = _trial(twins.in_float64, kind)
        if again.verdict in FINE:
            note = f"float32 rounding {outcome.error:.0e}, float64 {again.error:.0e}"
            outcome = Outcome(kind, again.verdict, note, again.error, again.where, again.cost)
    return Outcome(**{**outcome.to_dict(), "elapsed_s": round(time.perf_counter() - started, 1)})


def _trial(twins: Twins, kind: str) -> Outcome:
    if not is_applicable(kind, twins.model):
        return Outcome(kind, UNRUNNABLE, "its forward takes no such arguments")
    batch = {name: tensor.to(twins.device) for name, tensor in make_batch(kind, twins.config).items()}
    try:
        reference = run_whole(copy.deepcopy(twins.model), batch)
    except Exception as error:
        return Outcome(kind, UNRUNNABLE, in_one_line(error))
    try:
        model = twins.transformed(batch)
        own, where = worst(twins.run(model, reference, batch))
    except Exception as error:
        return unanswered(kind, error)
    largest, cost = _largest_of_ranks(own), describe_cost(model, batch)
    verdict = WRONG if largest > TOLERANCE[twins.dtype] else GATHERED if cost else EXACT
    return Outcome(kind, verdict, error=largest, where=where, cost=cost)


def unanswered(kind: str, error: BaseException) -> Outcome:
    """The outcome where sharding raised `error`: refused by us, or failed."""
    return Outcome(kind, REFUSED if isinstance(error, SurgeryError) else FAILED, in_one_line(error))


def _largest_of_ranks(error: float) -> float:
    if not dist.is_initialized():
        return error
    largest = torch.tensor(error, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def describe_cost(model: Any, batch: Batch) -> str:
    """Which operations every rank runs whole for a call, counted: `conv1d x 2, cumsum`; "" where there are none."""
    program = model.surgery.prepare(**batch)
    counts: dict[str, int] = {}
    for row in model.surgery.report(program).to_dict()["gathered"]:
        name = row["first"]["operation"]
        counts[name] = counts.get(name, 0) + row["count"]
    return ", ".join(f"{name} x {count}" if count > 1 else name for name, count in sorted(counts.items()))
