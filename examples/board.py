"""What the demo shows: a progress bar for each run, a table that grows with the second, both curves, and the costs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from curves import draw_curves
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SHOWN_STEPS = 12
PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN = 100, 13, 12
MIB = 2**20


@dataclass
class Run:
    """One training run: what it is, and what it left behind. Its numbers are those of one rank."""

    name: str
    tokens: int
    saved_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)


class Board:
    """Follows an unsharded run, then a sharded one, and compares their losses."""

    def __init__(self, console: Console, steps: int, tolerance: float) -> None:
        self.console = console
        self.steps = steps
        self.tolerance = tolerance
        columns = TextColumn("{task.description:<20}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, TextColumn("{task.fields[loss]}"), console=console)
        self.table = make_table("step", "unsharded loss", "sharded loss", "difference")
        self.live = Live(self.progress, console=console, refresh_per_second=4)

    def follow(self, run: Run, losses: Iterable[float], beside: Run | None = None) -> None:
        """Drive `run` to its end, comparing it with the finished run `beside`."""
        task = self.progress.add_task(run.name, total=self.steps, loss="")
        start = time.perf_counter()
        for loss in losses:
            now = time.perf_counter()
            run.losses.append(loss)
            run.step_s.append(now - start)
            start = now
            self.progress.update(task, advance=1, loss=f"loss {loss:.4f}")
            if beside is not None:
                self._compare(len(run.losses), beside.losses[len(run.losses) - 1], loss)

    def _compare(self, step: int, expected: float, found: float) -> None:
        difference = abs(found - expected)
        is_equal = difference <= self.tolerance
        if step > 1 and step % -(-self.steps // SHOWN_STEPS) and is_equal:
            return
        style = "green" if is_equal else "bold red"
        self.table.add_row(str(step), f"{expected:.6f}", f"{found:.6f}", f"[{style}]{difference:.1e}[/]")
        self.live.update(Group(self.progress, "", self.table))

    def conclude(self, unsharded: Run, sharded: Run) -> bool:
        """Print the curves, the costs and the verdict; return whether the losses agree."""
        differences = [abs(a - b) for a, b in zip(unsharded.losses, sharded.losses, strict=True)]
        is_equal = all(difference <= self.tolerance for difference in differences)
        worst = max(range(self.steps), key=differences.__getitem__)
        verdict = "[bold green]The losses agree[/]" if is_equal else "[bold red]The losses part[/]"
        width = min(self.console.width, PLOT_WIDTH) - PLOT_MARGIN
        names = unsharded.name, sharded.name
        curves = draw_curves(unsharded.losses, sharded.losses, names, width, PLOT_HEIGHT)
        self.console.print("", curves, "", costs(unsharded, sharded), "", sep="\n")
        found, allowed = f"{differences[worst]:.1e} at step {worst + 1}", f"{self.tolerance:.0e}"
        self.console.print(f"{verdict}: the largest difference is {found}; {allowed} is allowed.")
        return is_equal


def costs(*runs: Run) -> Table:
    """What a step costs one rank of each run."""
    table = make_table("on each rank", "tokens", "saved for backward", "a step takes")
    table.columns[0].justify = "left"
    for run in runs:
        table.add_row(run.name, str(run.tokens), f"{run.saved_bytes / MIB:.1f} MiB", f"{median(run.step_s):.2f} s")
    return table


def make_table(*headings: str) -> Table:
    """A table of numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
