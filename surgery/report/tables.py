"""The tables of a report, each a function from the facts to what is shown. Tables with nothing to say are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Literal

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from surgery.report.costs import Traffic
from surgery.report.summary import PassRow, Summary
from surgery.report.text import bytes_text, range_text

Shown = Iterator[RenderableType]

EXAMPLE_LENGTH = 32768
MOST_ROWS = 12
MOST_TARGETS = 6
WIDEST_SITE = 30
WARNING = "bold red"


def attention(summary: Summary) -> Shown:
    if not summary.sites:
        return
    calls = sum(row.count for row in summary.sites)
    held = "each token it holds" if _num_sequences(summary) == 1 else "each token of S, of T"
    yield _title(f"Attention: {_counted(calls, 'call')}", f"bytes: sent by one rank for {held}, forward + backward")
    table = _table("site", "heads>", "KV heads>", "runs as", "bytes>", "exchange")
    table.columns[0].min_width = min(max(len(row.path) for row in summary.sites) + len(" × 99"), WIDEST_SITE)
    for row in summary.sites:
        site, times = row.first, f" × {row.count}" if row.count > 1 else ""
        _add(
            table,
            Text.assemble(row.path, (times, "bold blue"), (f"\n  {site.source_line}", "dim")),
            f"{range_text(site.fewest_heads_per_rank, site.heads_per_rank)} of {site.num_heads}",
            f"{range_text(site.fewest_kv_heads_per_rank, site.kv_heads_per_rank)} of {site.num_kv_heads}",
            f"{site.implementation}\n{site.mask}",
            _sent_both_ways(site.forward_bytes_per_token, site.backward_bytes_per_token),
            site.status,
        )
    yield table


def _sent_both_ways(forward: tuple[int, ...], backward: tuple[int, ...]) -> str:
    """`1,536 + 1,536`; of two sequences a line for each: `S 1,024 + 1,024`, `T 512 + 512`."""
    pairs = zip(("", "") if len(forward) == 1 else ("S ", "T "), forward, backward, strict=False)
    return "\n".join(f"{name}{sent:,} + {returned:,}" for name, sent, returned in pairs if sent or returned or not name)


def cost(summary: Summary) -> Shown:
    if not summary.traffic:
        return
    header = summary.header
    yield _title("Cost of a step", "bytes sent by one rank, for each token it holds")
    table = _table("", "collective", "calls>", "bytes>", "")
    for row in summary.traffic:
        size, unit = _size(row)
        _add(table, row.direction, row.kind, f"{row.count:,}", size, unit)
    yield table
    share = EXAMPLE_LENGTH // header.sp_size
    sent = " and ".join(f"{bytes_text(share * _per_token(summary, way))} {way}" for way in ("forward", "backward"))
    whole, held = f"one sequence of {EXAMPLE_LENGTH:,} tokens", f"{share:,}"
    if _num_sequences(summary) == 2:
        whole, held = f"a source S and a target T of {EXAMPLE_LENGTH:,} tokens each", f"{share:,} of either"
    yield _note(f"Each rank holds 1/{header.sp_size} of the tokens: of {whole} {held}. It sends {sent}.")


def _size(row: Traffic) -> tuple[str, str]:
    """The bytes of a row of the table of costs, and what they are counted for."""
    if row.bytes_per_token is None:
        return row.bytes_per_call, "in all"
    if len(row.bytes_per_token) == 1:
        return f"{row.bytes_per_token[0]:,}", "a token"
    of_source, of_target = row.bytes_per_token
    return f"{of_source:,} + {of_target:,}", "a token of S + of T"


def _per_token(summary: Summary, direction: str) -> int:
    return sum(sum(row.bytes_per_token or ()) for row in summary.traffic if row.direction == direction)


def _num_sequences(summary: Summary) -> int:
    """1, or 2 for the source and the target of an encoder-decoder."""
    return max((len(row.bytes_per_token or ()) for row in summary.traffic), default=1)


def outputs(summary: Summary) -> Shown:
    if not summary.outputs:
        return
    yield _title("Outputs")
    table = _table("output", "on one rank", "placement", "")
    for row in summary.outputs:
        hint = f"model.surgery.gather({row.name}) makes it whole" if row.is_sharded else "whole on every rank"
        _add(table, row.name, f"{row.dtype} [{', '.join(row.shape)}]", row.placement, hint)
    yield table


def operations(summary: Summary) -> Shown:
    if not summary.operations:
        return
    total = sum(row.count for row in summary.operations)
    yield _title(f"Operations: {total:,}", "none refused: transform() would have raised")
    table = _table("run", "family", "count>", "")
    previous = ""
    for row in summary.operations:
        targets = [f"{name} {count:,}" for name, count in list(row.targets.items())[:MOST_TARGETS]]
        more = len(row.targets) - MOST_TARGETS
        targets += [f"{more} more"] if more > 0 else []
        how = row.how if row.how != previous else ""
        _add(table, how, row.family if row.family != row.how else "", f"{row.count:,}", ", ".join(targets))
        previous = row.how
    yield table


def gathered(summary: Summary) -> Shown:
    if not summary.gathered:
        if summary.operations:
            yield _title("Gathered: nothing")
        return
    count = sum(row.count for row in summary.gathered)
    title = f"Gathered: {_counted(count, 'operation')}"
    yield _title(title, "exact, but every rank waits for an all-gather", WARNING)
    table = _table("operation", "place", "source", "times>", "why")
    for row in summary.gathered[:MOST_ROWS]:
        _add(table, row.first.operation, row.path, row.first.source_line, str(row.count), row.first.reason)
    yield table
    yield from _rest(summary.gathered)


def replicated(summary: Summary) -> Shown:
    if not summary.whole:
        return
    floating = sum(row.count for row in summary.whole if not row.first.is_integer)
    verdict = f"{floating} of them floating: that work is not shared" if floating else "integers only, as it should be"
    count = sum(row.count for row in summary.whole)
    title = f"Replicated: {_counted(count, 'value')} whole on every rank"
    yield _title(title, verdict, WARNING if floating else "bold")
    table = _table("type", "values")
    for kind, names in _by_type(summary).items():
        _add(table, kind, ", ".join(names))
    yield table


def _by_type(summary: Summary) -> dict[str, list[str]]:
    """The replicated values by dtype and shape; floating ones, which should not be there, first and with a place."""
    found: dict[str, list[str]] = {}
    for row in sorted(summary.whole, key=lambda row: row.first.is_integer):
        place = f" at {row.path}" if row.path and not row.first.is_integer else ""
        times = f" × {row.count}" if row.count > 1 else ""
        kind = f"{row.first.dtype} [{', '.join(row.first.shape)}]"
        found.setdefault(kind, []).append(f"{row.first.operation}{place}{times}")
    return found


def passes(summary: Summary) -> Shown:
    if not summary.passes:
        return
    elapsed_ms = sum(row.elapsed_ms for row in summary.passes)
    yield _title(f"Passes: {len(summary.passes)}", f"{elapsed_ms:,.0f} ms")
    table = _table("pass", "changed>", "ms>", "what for, and what it skipped")
    for row in summary.passes:
        text = "\n".join([row.purpose, *_skips(row)])
        _add(table, row.name, f"{row.changed:,}", f"{row.elapsed_ms:,.1f}", text)
    yield table


def _skips(row: PassRow) -> list[str]:
    shown = [f"skipped {s.path}{f' × {s.count}' if s.count > 1 else ''}: {s.first.reason}" for s in row.skips]
    return [*shown[:MOST_ROWS], *_more(shown)]


def _rest(rows: Sized) -> Shown:
    yield from map(_note, _more(rows))


def _more(rows: Sized) -> list[str]:
    """A line that says how many rows are not shown, or none."""
    return [f"and {len(rows) - MOST_ROWS} more, in to_dict()"] if len(rows) > MOST_ROWS else []


def _title(text: str, remark: str = "", style: str = "bold") -> Text:
    return Text.assemble("\n", (text, style), (f"   {remark}" if remark else "", "dim"))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _note(text: str) -> RenderableType:
    return Text(text, style="dim")


def _table(*columns: str) -> Table:
    """A table with these columns; a name that ends in ">" is aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    for name in columns:
        justify: Literal["left", "right"] = "right" if name.endswith(">") else "left"
        table.add_column(name.removesuffix(">"), justify=justify, overflow="fold")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


TABLES: tuple[Callable[[Summary], Shown], ...] = (
    attention,
    cost,
    outputs,
    operations,
    gathered,
    replicated,
    passes,
)
