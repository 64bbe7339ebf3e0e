"""Gather the facts of a transformed model from its graph and its passes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from surgery.exchange.head_plan import HeadPlan
from surgery.exchange.row_plan import RowPlan
from surgery.metadata import Context, PassRecord, Site, facts_of
from surgery.placement import HeadSharded, RowSharded, Sharded
from surgery.programs.program import Program
from surgery.recipe import SEQUENCE_PARALLEL
from surgery.report.costs import find_traffic, site_bytes
from surgery.report.layers import fold
from surgery.report.notation import notation_of, short_dtype, spell
from surgery.report.operations import count_operations, find_gathered, find_whole
from surgery.report.summary import Header, OutputRow, PassRow, SiteRow, Summary
from surgery.report.text import range_text

if TYPE_CHECKING:
    from surgery.model_surgery import ModelSurgery

GRADIENTS = {
    "mean": "the average over the ranks is the unsharded model's (as DDP, FSDP and ZeRO take it)",
    "sum": "the sum over the ranks is the unsharded model's",
}


def summarize(surgery: ModelSurgery, program: Program | None) -> Summary:
    """Gather the facts of one program of a transformed model."""
    header = _header(surgery, program)
    if program is None:
        return Summary(header)
    sites = [_site_row(site, program.context, header.bypass) for site in program.context.sites]
    return Summary(
        header,
        tuple(fold(sites, lambda row: row.path, _without_path)),
        find_traffic(program),
        tuple(_outputs(program)),
        count_operations(program),
        find_gathered(program),
        find_whole(program),
        tuple(_pass_row(record) for record in program.context.records),
    )


def _header(surgery: ModelSurgery, program: Program | None) -> Header:
    options, parameters = surgery.options, list(surgery.model.parameters())
    return Header(
        model=type(surgery.model).__name__,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        dtypes=tuple(sorted({short_dtype(parameter.dtype) for parameter in parameters})),
        sp_size=options.sp_size,
        mesh=_mesh(surgery),
        signature=str(program.signature) if program is not None else "",
        lengths=_lengths(surgery, program),
        gradients=GRADIENTS[options.gradients],
        on_unknown=options.on_unknown,
        bypass=surgery.bypass_reason(),
        other_signatures=tuple(str(other.signature) for other in surgery.programs if other is not program),
    )


def _mesh(surgery: ModelSurgery) -> str:
    sp_size, mpu = surgery.options.sp_size, surgery.mpu
    if mpu is None:
        return f"no process group: looked at for {sp_size} ranks" if sp_size > 1 else "one rank"
    if not mpu.has_data_parallel:
        return f"sp {sp_size}, in a mesh with other dimensions"
    dp_size = mpu.get_data_parallel_world_size()
    return f"dp {dp_size} x sp {sp_size}: {dp_size * sp_size} ranks"


def _lengths(surgery: ModelSurgery, program: Program | None) -> str:
    options = surgery.options
    if not options.seq_length_is_variable:
        return f"{options.seq_length} tokens only"
    if program is None:
        return "any"
    conditions = sorted(spell(notation_of(program.context).letters(c)) for c in program.context.assumptions)
    return f"any{', where ' if conditions else ''}{' and '.join(conditions)}"


def _site_row(site: Site, context: Context, bypass: str | None) -> SiteRow:
    sp_size = context.axis.size
    plan = site.plan(sp_size)
    heads, kv_heads = ([len(own(rank)) for rank in range(sp_size)] for own in (plan.heads, plan.kv_heads))
    is_exchanged = isinstance(facts_of(site.node).placement, HeadSharded | RowSharded)
    skipped = "bypassed: its tokens are whole on every rank"
    size = site_bytes(site, context) if is_exchanged else (0,) * len(context.lengths)
    return SiteRow(
        path=site.module_path,
        source_line=site.source_line,
        num_heads=site.num_heads,
        num_kv_heads=site.num_kv_heads,
        fewest_heads_per_rank=min(heads) if is_exchanged else site.num_heads,
        heads_per_rank=max(heads) if is_exchanged else site.num_heads,
        fewest_kv_heads_per_rank=min(kv_heads) if is_exchanged else site.num_kv_heads,
        kv_heads_per_rank=max(kv_heads) if is_exchanged else site.num_kv_heads,
        implementation=site.implementation,
        mask=str(site.mask) if site.mask is not None else "the model's own tensor",
        forward_bytes_per_token=size,
        backward_bytes_per_token=size,
        status=f"bypassed: {bypass}" if bypass is not None else _exchanged(plan) if is_exchanged else skipped,
    )


def _exchanged(plan: HeadPlan | RowPlan) -> str:
    if not isinstance(plan, RowPlan):
        return "exchanged"
    counts = [len(plan.sharers(head)) for head in range(plan.num_heads)]
    return f"exchanged, {range_text(min(counts), max(counts))} ranks a head"


def _without_path(row: SiteRow) -> tuple[object, ...]:
    return tuple(value for name, value in vars(row).items() if name != "path")


def _outputs(program: Program) -> list[OutputRow]:
    notation = notation_of(program.context)
    rows = []
    for name, node in program.outputs:
        value, placement = node.meta["val"], facts_of(node).placement
        shape = notation.shape(value, placement)
        rows.append(OutputRow(name, short_dtype(value.dtype), shape, str(placement), isinstance(placement, Sharded)))
    return rows


def _pass_row(record: PassRecord) -> PassRow:
    skips = fold(record.skips, lambda skip: skip.where, lambda skip: skip.reason)
    return PassRow(record.name, purpose_of(record.name), record.changed, record.elapsed_ms, tuple(skips))


def purpose_of(name: str) -> str:
    """The first clause of the docstring of the file that holds the pass called `name`."""
    known = {step.name: sys.modules[type(step).__module__].__doc__ for step in SEQUENCE_PARALLEL}
    text = known.get(name) or ""
    ends = [text.find(mark) for mark in (":", ";", ",", ".") if mark in text]
    return text[: min(ends, default=len(text))].replace("`", "")
