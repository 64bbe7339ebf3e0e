"""How the lines of a graph are laid out: columns that the tables of all sections share, marks, and colours.

⇄ exchange   ↓ shard   ↑ gather   Σ all-reduce
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from surgery.report.listing import Line

GLYPHS = {"exchange": "⇄", "shard": "↓", "gather": "↑", "all-reduce": "Σ"}
STYLES = {"exchange": "bold magenta", "shard": "cyan", "gather": "bold red", "all-reduce": "bold yellow"}
PLACEMENT_STYLES = {"replicated": "dim", "sharded": "green", "heads": "magenta", "partial": "yellow"}
LEGEND = "Shapes are what one rank holds.   ⇄ all-to-all   ↓ shard (local)   ↑ all-gather   Σ all-reduce"
WIDTH_WITH_FAMILIES, WIDTH_WITH_SOURCES = 112, 136


@dataclass(frozen=True)
class Columns:
    """The widths of the columns; the call gets what is left. A column of width 0 is not shown."""

    name: int
    type: int
    placement: int
    family: int
    source: int

    @classmethod
    def of(cls, lines: Sequence[Line], width: int, *, is_detailed: bool) -> Columns:
        """As wide as the widest entry; where a terminal is narrow, the details give way to the calls."""
        return cls(
            max(len(line.name) for line in lines),
            max(len(line.type) for line in lines),
            max(len(line.placement) for line in lines),
            max(len(line.family) for line in lines) * (is_detailed and width >= WIDTH_WITH_FAMILIES),
            max(len(line.source_line) for line in lines) * (is_detailed and width >= WIDTH_WITH_SOURCES),
        )

    def table(self, lines: Sequence[Line]) -> Table:
        """The lines below one heading."""
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(width=3, justify="right")
        table.add_column(width=self.name, no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        for width in (self.type, self.placement, self.family, self.source):
            if width:
                table.add_column(width=width, no_wrap=True)
        for line in lines:
            table.add_row(*self._cells(line), style=STYLES.get(line.mark))
        return table

    def _cells(self, line: Line) -> list[Text]:
        cells = [Text(text) for text in (GLYPHS.get(line.mark, ""), line.name, line.call, line.type)]
        cells.append(placement_text(line.placement))
        cells += [Text(line.family, style="dim")] if self.family else []
        cells += [Text(line.source_line, style="dim")] if self.source else []
        return cells


def placement_text(written: str) -> Text:
    """A placement in its colour."""
    return Text(written, style=PLACEMENT_STYLES.get(written.split("(")[0].split()[0], ""))
