"""`surgery verify`: does sequence parallelism compute this architecture's numbers? Proven on a shrunk model, here.

config  --shrink-->  tiny model  --capture, P processes on gloo-->  whole against sharded, for each kind of input

kind           outcome    worst error   of
plain          exact      2.1e-07       model.layers.1.mlp.up_proj.weight
left-padded    gathered   1.9e-07       lm_head.weight                       cumsum x 2: whole on every rank
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig

from surgery.errors import ConfigurationError, in_one_line
from surgery.verify.batches import KINDS, find_families
from surgery.verify.catalog import Architecture, find_architecture
from surgery.verify.forked import can_fork, run_forked
from surgery.verify.ranks import RankPool, RanksFailedError, RanksLostError
from surgery.verify.shrink import shrink
from surgery.verify.trial import (
    EXACT,
    FAILED,
    FINE,
    GATHERED,
    REFUSED,
    UNRUNNABLE,
    WRONG,
    Outcome,
    try_model,
    unanswered,
)

FINE_CODE, REFUSED_CODE, WRONG_CODE = 0, 1, 3
TIMEOUT_S = 300
FAMILY_TIMEOUT_S = 3 * TIMEOUT_S  # one kind may wait for forked ranks twice, the second time in float64
STYLES = {
    EXACT: "green",
    GATHERED: "yellow",
    REFUSED: "red",
    FAILED: "bold red",
    UNRUNNABLE: "dim",
    WRONG: "bold white on red",
}
WHAT_NEXT = {
    WRONG_CODE: "Wrong or failed: do not train this architecture so, and please report this table.",
    REFUSED_CODE: "What is refused raises a SurgeryError in training too; nothing is computed wrongly.",
    FINE_CODE: "Loss, outputs and every unscaled gradient are the unsharded model's.",
}


@dataclass(frozen=True)
class Verification:
    """What `surgery verify` found; renders as a table."""

    class_name: str
    sp_size: int
    num_layers: int
    outcomes: tuple[Outcome, ...]

    @property
    def exit_code(self) -> int:
        verdicts = {outcome.verdict for outcome in self.outcomes}
        if verdicts & {WRONG, FAILED}:
            return WRONG_CODE
        return REFUSED_CODE if REFUSED in verdicts or not verdicts & set(FINE) else FINE_CODE

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.class_name,
            "sp_size": self.sp_size,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        layers = f"{self.num_layers} layers, one of each kind at least"
        yield Text.assemble((self.class_name, "bold"), f", shrunk to {layers}, on {self.sp_size} ranks\n")
        yield outcome_table(self.outcomes)
        yield Text(f"\n{WHAT_NEXT[self.exit_code]}")


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """One row for each kind of input."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    for name in ("input", "outcome", "worst error", "of", "what it costs, or why not"):
        table.add_column(name, overflow="fold")
    for outcome in outcomes:
        error = f"{outcome.error:.1e}" if outcome.error is not None else ""
        cost = f"{outcome.cost}: whole on every rank" if outcome.cost else outcome.reason
        cells = (outcome.kind, Text(outcome.verdict, STYLES[outcome.verdict]), error, outcome.where, Text(cost))
        table.add_row(*cells)
    return table


def verify(
    config: PreTrainedConfig,
    sp_size: int,
    done: Callable[[str], None] = lambda kind: None,
    *,
    device: str = "cpu",
) -> Verification:
    """Shrink `config` and try every kind of input on `sp_size` ranks.

    `done` is called with each kind when it is, from several threads and in any order. The ranks share a `device` that
    is not the CPU.
    """
    architecture = find_architecture(config)
    try:
        small = architecture.as_decoder(shrink(config, sp_size))
    except Exception as error:
        raise ConfigurationError(f"{type(config).__name__} cannot be shrunk: {in_one_line(error)}") from error
    outcomes = _Trials(architecture, small, sp_size, device, done).run(KINDS)
    depth = int(getattr(small.get_text_config(), "num_hidden_layers", 0))
    return Verification(architecture.class_name, sp_size, depth, outcomes)


class _Trials:
    """All kinds of input for one tiny model: families of them side by side, where ranks can be forked."""

    def __init__(
        self,
        architecture: Architecture,
        config: PreTrainedConfig,
        sp_size: int,
        device: str,
        done: Callable[[str], None],
    ) -> None:
        self.architecture, self.config, self.sp_size, self.device = architecture, config, sp_size, device
        self.done = done
        self.is_forked = device == "cpu" and sp_size > 1 and can_fork()
        self._open: set[RankPool] = set()

    def run(self, kinds: Iterable[str]) -> tuple[Outcome, ...]:
        kinds = list(kinds)
        families = find_families(kinds) if self.is_forked else [kinds]
        with ThreadPoolExecutor(min(len(families), os.cpu_count() or 1)) as threads:
            try:
                found = {each.kind: each for outcomes in threads.map(self._run_family, families) for each in outcomes}
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for pool in list(self._open):
                    pool.kill()
                raise
        return tuple(found[kind] for kind in kinds)

    def _run_family(self, kinds: list[str]) -> list[Outcome]:
        pool = RankPool(1, FAMILY_TIMEOUT_S, has_pools=True) if self.is_forked else RankPool(self.sp_size, TIMEOUT_S)
        self._open.add(pool)
        run = run_forked if self.is_forked else None
        outcomes: list[Outcome] = []
        try:
            arguments = (self.architecture.make, self.config, self.sp_size, kinds, self.device, run)
            for by_rank in pool.stream(try_model, *arguments):
                outcomes.append(by_rank[0])
                self.done(by_rank[0].kind)
        except (RanksLostError, RanksFailedError) as error:
            outcomes += [unanswered(kind, error) for kind in kinds[len(outcomes) :]]
        finally:
            self._open.discard(pool)
            pool.close()
        return outcomes
