"""The page that a sweep leaves: `docs/coverage.md`, counts on top, then every architecture, then reasons in groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import transformers

from surgery.verify.catalog import list_architectures
from surgery.verify.sweep import Row
from surgery.verify.trial import EXACT, FAILED, FINE, GATHERED, REFUSED, UNRUNNABLE, WRONG, Outcome

VERDICTS = (EXACT, GATHERED, REFUSED, FAILED, UNRUNNABLE, WRONG)
MEANINGS = {
    EXACT: "loss, outputs and every unscaled gradient are the unsharded model's; nothing runs whole but attention",
    GATHERED: "as exact, but the operations named run on all tokens on every rank",
    REFUSED: "`transform`, or the call, raises an error of this package, which says why",
    FAILED: "another error is raised, or nothing is answered in time: a bug",
    UNRUNNABLE: "the unsharded model cannot run on token ids and labels here either",
    WRONG: "the numbers differ: a bug",
}
LONGEST_CELL = 160


def coverage_page(rows: Sequence[Row], sp_size: int) -> str:
    """The page as Markdown."""
    return "\n".join([*_head(rows, sp_size), *_table(rows), *_reasons(rows), *_untried(rows)]) + "\n"


def verdict_of(row: Row) -> str:
    """The worst of an architecture's outcomes that says something; unrunnable if none does."""
    found = {outcome.verdict for outcome in row.outcomes}
    return next((verdict for verdict in (WRONG, FAILED, REFUSED, GATHERED, EXACT) if verdict in found), UNRUNNABLE)


def _head(rows: Sequence[Row], sp_size: int) -> Iterator[str]:
    counts = Counter(verdict_of(row) for row in rows)
    runnable = len(rows) - counts[UNRUNNABLE]
    kinds = sorted({outcome.kind for row in rows for outcome in row.outcomes})
    yield "# Coverage"
    yield ""
    versions = f"transformers {transformers.__version__} (torch {torch.__version__})"
    yield f"Every text architecture of {versions}: each class of the causal, sequence-to-sequence and masked"
    yield "language model mappings, from its default configuration, shrunk, run whole and on"
    yield f"{sp_size} simulated ranks (threads that exchange in memory). `make sweep` made it; `coverage.jsonl` has the"
    yield "same facts as data. Proof by real processes, for a configuration of your own: `surgery verify MODEL`."
    yield ""
    yield f"Inputs: {', '.join(kinds)}. Allowed error: 1e-5 in float32; what is above is measured in float64 again."
    revisions = Counter(row.revision or "unknown" for row in rows).most_common()
    yield f"Computed on: {', '.join(sorted({row.device for row in rows}))}."
    yield f"Revisions tried: {', '.join(f'{name} ({count} rows)' for name, count in revisions)}."
    yield ""
    yield "| outcome | architectures | of those that run | |"
    yield "|---|---:|---:|---|"
    for verdict in VERDICTS:
        share = f"{counts[verdict] / max(runnable, 1):.1%}" if verdict != UNRUNNABLE else ""
        yield f"| {verdict} | {counts[verdict]} | {share} | {MEANINGS[verdict]} |"
    yield ""


def _table(rows: Sequence[Row]) -> Iterator[str]:
    for task in dict.fromkeys(row.architecture.task for row in rows):
        yield f"## {task}"
        yield ""
        yield "| architecture | outcome | worst error | of | runs whole, or why not |"
        yield "|---|---|---:|---|---|"
        for row in rows:
            if row.architecture.task == task:
                outcome = _telling(row)
                error = f"{outcome.error:.1e}" if outcome.error is not None else ""
                name = row.architecture.class_name
                yield f"| {name} | {outcome.verdict} | {error} | {outcome.where} | {_cell(outcome)} |"
        yield ""


def _telling(row: Row) -> Outcome:
    verdict = verdict_of(row)
    told = [outcome for outcome in row.outcomes if outcome.verdict == verdict]
    return max(told, key=lambda outcome: outcome.error or 0.0)


def _cell(outcome: Outcome) -> str:
    text = outcome.cost if outcome.verdict in FINE and outcome.cost else outcome.reason
    short = text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}..."
    return short.replace("|", "\\|")


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        if verdict_of(row) in (REFUSED, FAILED, WRONG):
            groups.setdefault(_family(_telling(row)), []).append(row.architecture.class_name)
    yield "## Refused or failed, by reason"
    yield ""
    for reason, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield f"- **{reason}** ({len(names)}): {', '.join(names)}"


def _untried(rows: Sequence[Row]) -> Iterator[str]:
    tried = {row.architecture for row in rows}
    names = [each.class_name for each in list_architectures() if each not in tried]
    if names:
        yield ""
        yield f"## Not tried yet ({len(names)})"
        yield ""
        yield ", ".join(names)


def _family(outcome: Outcome) -> str:
    return next((name for mark, name in FAMILIES if mark in outcome.reason), outcome.reason[:LONGEST_CELL])


FAMILIES = (
    ("Constraints violated", "the forward fixes the sequence length, or loops over it"),
    ("data-dependent expression", "the forward branches on values of tensors"),
    ("depends on data", "sizes that depend on data"),
    ("torch.autograd.Function", "a backward of its own that differs from the derivative"),
    ("do not divide", "head counts or lengths that do not divide"),
    ("position_bias", "a position bias inside attention"),
    ("did not answer", "took too long"),
)
