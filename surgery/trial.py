"""A trial: one tiny model, one kind of input, whole and on P ranks, real or simulated; what came of it is its outcome.

exact        loss, outputs and every gradient within the tolerance
gathered     exact too, with operations that every rank runs whole: `cost` names them
refused      transform, or the call, said no: `reason`
unrunnable   the unsharded model cannot run on this input either: `reason`
wrong        off by `error`, most of all `where`
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from surgery.api import restore, transform
from surgery.batches import is_applicable, make_batch
from surgery.comparison import TOLERANCE, Reference, float_is_double, run_sharded, run_simulated, run_whole, worst
from surgery.errors import SurgeryError

EXACT, GATHERED, REFUSED, UNRUNNABLE, WRONG = "exact", "gathered", "refused", "unrunnable", "wrong"
FINE = (EXACT, GATHERED)
NOISE = 0.05
LONGEST_REASON = 400
MakeModel = Callable[[PreTrainedConfig], nn.Module]


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


def try_model(make: MakeModel, config: PreTrainedConfig, sp_size: int, kinds: list[str]) -> list[Outcome]:
    """The outcomes on this rank, one for each of `kinds` that the model takes; every rank calls this alike.

    Where there is no process group, the ranks are simulated: one capture instead of P.
    """
    try:
        model = build(make, config)
    except Exception as error:
        return [Outcome(kind, UNRUNNABLE, explain(error)) for kind in kinds]
    applicable = [kind for kind in kinds if is_applicable(kind, model)]
    if not applicable:
        return [Outcome(kind, UNRUNNABLE, "its forward takes no such arguments") for kind in kinds]
    return [try_kind(model, config, sp_size, kind) for kind in applicable]


def build(make: MakeModel, config: PreTrainedConfig) -> nn.Module:
    """A model with random weights from a fixed seed, also where the class would start from zeros or ones."""
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE)
    return model.train()


def try_kind(model: nn.Module, config: PreTrainedConfig, sp_size: int, kind: str) -> Outcome:
    """One trial in float32; what looks wrong there is measured again in float64, which tells errors from rounding."""
    started = time.perf_counter()
    outcome = _trial(model, config, sp_size, kind, torch.float32)
    if outcome.verdict == WRONG and outcome.error is not None:
        again = _trial(_in_float64(model), config, sp_size, kind, torch.float64)
        if again.verdict in FINE:
            note = f"float32 rounding {outcome.error:.0e}, float64 {again.error:.0e}"
            outcome = Outcome(kind, again.verdict, note, again.error, again.where, again.cost)
    return Outcome(**{**outcome.to_dict(), "elapsed_s": round(time.perf_counter() - started, 1)})


def _in_float64(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]  # grouped_mm has no float64
    return twin


def _trial(model: nn.Module, config: PreTrainedConfig, sp_size: int, kind: str, dtype: torch.dtype) -> Outcome:
    batch = make_batch(kind, config)
    with float_is_double() if dtype == torch.float64 else nullcontext():
        try:
            reference = run_whole(copy.deepcopy(model), batch)
        except Exception as error:
            return Outcome(kind, UNRUNNABLE, explain(error))
        twin: Any = copy.deepcopy(model)
        try:
            transform(twin, sp_size)
        except Exception as error:
            return Outcome(kind, REFUSED, explain(error))
        try:
            return _judge(twin, reference, batch, kind, TOLERANCE[dtype])
        finally:
            restore(twin)


def _judge(model: Any, reference: Reference, batch: dict[str, Any], kind: str, tolerance: float) -> Outcome:
    run = run_sharded if dist.is_initialized() else run_simulated
    try:
        errors = run(model, reference, batch)
    except Exception as failure:
        return Outcome(kind, REFUSED, explain(failure))
    own, where = worst(errors)
    error, cost = _largest_of_ranks(own), describe_cost(model)
    if error > tolerance:
        return Outcome(kind, WRONG, error=error, where=where, cost=cost)
    return Outcome(kind, GATHERED if cost else EXACT, error=error, where=where, cost=cost)


def _largest_of_ranks(error: float) -> float:
    if not dist.is_initialized():
        return error
    largest = torch.tensor(error, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def describe_cost(model: Any) -> str:
    """Which operations every rank runs whole, counted: `conv1d x 2, cumsum`; "" where there are none."""
    program = model.surgery.programs[-1]
    counts: dict[str, int] = {}
    for row in model.surgery.report(program).to_dict()["gathered"]:
        name = row["first"]["operation"]
        counts[name] = counts.get(name, 0) + row["count"]
    return ", ".join(f"{name} x {count}" if count > 1 else name for name, count in sorted(counts.items()))


def explain(error: BaseException) -> str:
    """An error in one line, with its class where it is not a refusal of ours."""
    text = re.sub(r"\s+", " ", str(error))[:LONGEST_REASON]
    return text if isinstance(error, SurgeryError) else f"{type(error).__name__}: {text}"
