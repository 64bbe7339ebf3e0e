"""`model.surgery.print_graph()`: the rewritten graph, layer by layer, with what each rank holds beside each value.

    ⇄  exchange_to_heads   exchange_to_heads(add_2, add_3, transpose_2)                            heads(1)
       getitem_9           exchange_to_heads[0]                            f32 [B, 32/P, S, 128]   heads(1)

The data is made by `surgery/report/sections.py` and `surgery/report/listing.py`; here it is laid out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from surgery.errors import ConfigurationError, InputError
from surgery.metadata import facts_of
from surgery.programs.program import Program
from surgery.report.layout import LEGEND, Columns, placement_text
from surgery.report.listing import Line
from surgery.report.notation import notation_of
from surgery.report.sections import find_sections, list_sections
from surgery.report.text import DEFAULT_WIDTH, plain_text, terminal_width

if TYPE_CHECKING:
    from surgery.model_surgery import ModelSurgery


@dataclass(frozen=True)
class PrintedSection:
    """A layer, or what lies between layers, and how many identical ones it stands for."""

    title: str
    count: int
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class PrintedOutput:
    """An output of the graph: its field in the model's output class, the value it returns, and how that is placed."""

    name: str
    value: str
    placement: str


@dataclass(frozen=True)
class GraphPrintout:
    """A graph to look at: `print()` it, hand it to a rich console, or take its text or data."""

    signature: str
    sp_size: int
    sections: tuple[PrintedSection, ...]
    outputs: tuple[PrintedOutput, ...]
    is_detailed: bool = False

    def to_text(self, width: int = DEFAULT_WIDTH) -> str:
        return plain_text(self, width)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return self.to_text(terminal_width())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.signature, "bold"), f"   B batch, S sequence, P = {self.sp_size} ranks")
        yield Text(LEGEND, style="dim")
        lines = [line for section in self.sections for line in section.lines]
        columns = Columns.of(lines, options.max_width, is_detailed=self.is_detailed)
        for section in self.sections:
            yield Text("")
            yield from _render_section(section, columns)
        yield from _render_outputs(self.outputs)


def make_printout(surgery: ModelSurgery, layer: int | None = None, program: Program | None = None) -> GraphPrintout:
    """The printout of a program: everything with identical layers once, or one layer in full detail."""
    program = program if program is not None else next(iter(surgery.programs), None)
    if program is None:
        raise ConfigurationError(
            "sp_size is 1: the model runs as it is, and no graph was captured. Use sp_size 2 or more."
        )
    notation = notation_of(program.context)
    found = list_sections(program, layer)
    if not found:
        indices = [section.layer.index for section in find_sections(program.graph) if section.layer is not None]
        expected = f"a layer from {min(indices)} to {max(indices)}" if indices else "none: the graph has no layers"
        raise InputError(f"expected {expected}, found layer={layer}. Leave it out to see the whole graph.")
    sections = tuple(PrintedSection(s.title, max(len(s.indices), 1), tuple(s.lines(notation))) for s in found)
    outputs = [PrintedOutput(name, node.name, str(facts_of(node).placement)) for name, node in program.outputs]
    return GraphPrintout(
        str(program.signature),
        program.context.axis.size,
        sections,
        tuple(outputs) if layer is None else (),
        is_detailed=layer is not None,
    )


def _render_section(section: PrintedSection, columns: Columns) -> Iterator[RenderableType]:
    if section.title:
        times = f"  × {section.count}" if section.count > 1 else ""
        yield Text.assemble((section.title, "bold"), (times, "bold blue"))
    for part, lines in groupby(section.lines, key=lambda line: line.part):
        if part:
            yield Text(f"  {part}", style="italic blue")
        yield columns.table(list(lines))


def _render_outputs(outputs: tuple[PrintedOutput, ...]) -> Iterator[RenderableType]:
    if outputs:
        yield Text("\nreturn", style="bold")
    for output in outputs:
        yield Text.assemble(f"     {output.name} = {output.value}   ", placement_text(output.placement))
