"""`model.surgery.report()`: what was found, what was inserted, what it costs.

The facts are gathered in `surgery/report/summarize.py`, the tables in `surgery/report/tables.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from surgery.programs.program import Program
from surgery.report.summarize import summarize
from surgery.report.summary import Header, Summary
from surgery.report.tables import TABLES
from surgery.report.text import DEFAULT_WIDTH, count_text, plain_text, terminal_width

if TYPE_CHECKING:
    from surgery.model_surgery import ModelSurgery


@dataclass(frozen=True)
class Report:
    """A report to look at: `print()` it, hand it to a rich console, or take its text or data."""

    summary: Summary

    def to_text(self, width: int = DEFAULT_WIDTH) -> str:
        return plain_text(self, width)

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain data, for JSON."""
        return asdict(self.summary)

    def __str__(self) -> str:
        return self.to_text(terminal_width())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _render_header(self.summary.header)
        for table in TABLES:
            yield from table(self.summary)


def make_report(surgery: ModelSurgery, program: Program | None = None) -> Report:
    """The report on a transformed model's first program, or on the one given."""
    return Report(summarize(surgery, program if program is not None else next(iter(surgery.programs), None)))


def _render_header(header: Header) -> Panel:
    size = f"{count_text(header.num_parameters)} parameters, {', '.join(header.dtypes)}"
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _facts(header):
        grid.add_row(name, Text(value))
    title = Text.assemble((header.model, "bold"), f"  {size}  ", (f"sp_size {header.sp_size}", "bold green"))
    return Panel(grid, title=title, title_align="left", border_style="blue")


def _facts(header: Header) -> list[tuple[str, str]]:
    facts = [("mesh", header.mesh)]
    if header.signature:
        facts.append(("signature", f"{header.signature}; any batch size; lengths: {header.lengths}"))
    if header.other_signatures:
        facts.append(("also captured", ", ".join(header.other_signatures)))
    facts.append(("gradients", header.gradients))
    if header.bypass is not None:
        facts.append(("bypassed", f"the original forward runs: {header.bypass}"))
    return facts
