"""What a rewritten graph communicates, read off the graph: one row for each kind of collective.

    exchange       all-to-all   forward      all-to-all       backward
    gather         all-gather                reduce-scatter             where a gradient flows
    all_reduce     all-reduce                all-reduce                 where a gradient flows

Bytes are those that one rank sends. `bytes_per_token` counts them for each token the rank holds; it is None where they
do not grow with the tokens, or grow faster, and `bytes_per_call` says how, in letters. An encoder-decoder has two kinds
of tokens, those of the source S and of the target T, and a count for each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeGuard

import sympy
import torch
from torch import Tensor, fx

from surgery import collectives
from surgery.exchange import cross, heads, rows
from surgery.exchange.head_plan import HeadPlan
from surgery.exchange.row_plan import RowPlan
from surgery.metadata import Context, Site
from surgery.programs.program import Program
from surgery.report.notation import BATCH, LENGTHS, Notation, notation_of, spell
from surgery.shapes import product, shape_of

Direction = Literal["forward", "backward"]

DETACH = torch.ops.aten.detach.default


@dataclass(frozen=True)
class Kind:
    """A collective, its adjoint, and the bytes that one rank sends for a node that calls it."""

    forward: str
    backward: str
    sent: Callable[[fx.Node, Notation], sympy.Expr]


@dataclass(frozen=True)
class Collective:
    """One collective; `size_bytes` is what a rank sends in a call, in B and S."""

    kind: str
    direction: Direction
    size_bytes: sympy.Expr


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind and direction; of an encoder-decoder, bytes for each token of S, and of T."""

    kind: str
    direction: Direction
    count: int
    bytes_per_token: tuple[int, ...] | None
    bytes_per_call: str


def find_traffic(program: Program) -> tuple[Traffic, ...]:
    """Every kind of collective that a training step issues, forward before backward."""
    found: dict[tuple[str, Direction], list[Collective]] = {}
    for collective in find_collectives(program):
        found.setdefault((collective.kind, collective.direction), []).append(collective)
    rows = [_total(group, program.context) for group in found.values()]
    return tuple(sorted(rows, key=lambda row: (row.direction == "backward", -row.count)))


def find_collectives(program: Program) -> Iterator[Collective]:
    """The collectives that the graph calls, each followed by its adjoint where a gradient flows back."""
    notation = notation_of(program.context)
    differentiable = find_differentiable(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in KINDS:
            kind = KINDS[node.target]
            size = kind.sent(node, notation)
            yield Collective(kind.forward, "forward", size)
            if node in differentiable:
                yield Collective(kind.backward, "backward", size)


def find_differentiable(graph: fx.Graph) -> set[fx.Node]:
    """The values through which a gradient flows back to a trainable parameter."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if not isinstance(first, Tensor) or not first.is_floating_point() or node.target is DETACH:
            continue
        if first.requires_grad or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _shared(node: fx.Node, notation: Notation, *, times: int) -> sympy.Expr:
    """For each byte of the whole value a rank sends `times` (P-1)/P bytes."""
    value = node.meta["val"]
    size = notation.letters(product(shape_of(value))) * value.element_size()
    return size * times * sympy.Rational(notation.sp_size - 1, notation.sp_size)


def _exchanged(node: fx.Node, notation: Notation) -> sympy.Expr:
    """By the plan of the heads; of the busiest rank, where some have more than others."""
    value = node.meta["val"]
    is_first = node.target is heads.exchange_to_heads
    query, key, output = value if is_first else (value, value, value)
    plan = HeadPlan(int(query.shape[1]), int(key.shape[1]), notation.sp_size)
    sizes = plan.most_bytes_per_token(int(query.shape[3]), int(output.shape[3]), query.element_size())
    return _tokens(query, notation) * sizes[0 if is_first else 1]


def _cross_exchanged(node: fx.Node, notation: Notation) -> sympy.Expr:
    value = node.meta["val"]
    tokens = value if isinstance(value, tuple) else (value,)
    count, is_query = int(tokens[0].shape[1]), len(tokens) == 1
    num_heads: Any = count if is_query else node.args[2]
    plan = HeadPlan(num_heads, count, notation.sp_size)
    counts = [len(plan.heads(rank) if is_query else plan.kv_heads(rank)) for rank in range(notation.sp_size)]
    size = sum(int(x.shape[3]) * x.element_size() for x in tokens)
    return _tokens(tokens[0], notation) * (sum(counts) - min(counts)) * size


def _exchanged_rows(node: fx.Node, notation: Notation) -> sympy.Expr:
    """As many for each token as `RowPlan` says; queries and keys are of two lengths in cross-attention."""
    value = node.meta["val"]
    if not isinstance(value, tuple):
        plan = RowPlan(int(value.shape[1]), int(value.shape[1]), notation.sp_size)
        returned = max(plan.returned_features(rank, int(value.shape[3])) for rank in range(notation.sp_size))
        return _tokens(value, notation) * returned * value.element_size()
    query, key, output = value
    plan = RowPlan(int(query.shape[1]), int(key.shape[1]), notation.sp_size)
    queries = max(plan.sent_queries(rank) for rank in range(notation.sp_size)) * int(query.shape[3])
    keys = (notation.sp_size - 1) * (int(key.shape[3]) + int(output.shape[3]))
    sent = _tokens(query, notation) * queries + _tokens(key, notation) * keys
    return sent * query.element_size()


def _tokens(x: Tensor, notation: Notation) -> sympy.Expr:
    """How many tokens of `x`, [B, N, S, H], one rank holds."""
    return notation.letters(shape_of(x)[0] * shape_of(x)[2]) / notation.sp_size


KINDS: dict[Any, Kind] = {
    heads.exchange_to_heads: Kind("all-to-all", "all-to-all", _exchanged),
    heads.exchange_to_sequence: Kind("all-to-all", "all-to-all", _exchanged),
    cross.exchange_queries: Kind("all-to-all", "all-to-all", _cross_exchanged),
    cross.exchange_keys: Kind("all-to-all", "all-to-all", _cross_exchanged),
    rows.exchange_to_rows: Kind("all-to-all", "all-to-all", _exchanged_rows),
    rows.exchange_from_rows: Kind("all-to-all", "all-to-all", _exchanged_rows),
    collectives.gather: Kind("all-gather", "reduce-scatter", partial(_shared, times=1)),
    collectives.all_reduce: Kind("all-reduce", "all-reduce", partial(_shared, times=2)),
}


def site_bytes(site: Site, context: Context) -> tuple[int, ...]:
    """What a rank exchanges around one attention call, forward, for each token it holds: of S, and of T if any."""
    sources = [arg.args[0] if _is_part(arg) else arg for arg in site.node.args]
    around = {node for node in (*sources, *site.node.users) if isinstance(node, fx.Node) and _is_exchange(node)}
    notation = notation_of(context)
    sent = per_token(sum(KINDS[node.target].sent(node, notation) for node in around), context)
    assert sent is not None
    return sent


def per_token(size: sympy.Expr, context: Context) -> tuple[int, ...] | None:
    """`size` bytes of a call as so many for each token a rank holds: of S, and of T if there is one; None if unlike."""
    held = [BATCH * length / context.axis.size for length in LENGTHS[: len(context.lengths)]]
    counts = [sympy.expand(size).coeff(BATCH * length) * context.axis.size for length in LENGTHS[: len(held)]]
    rest = sympy.simplify(size - sum(count * tokens for count, tokens in zip(counts, held, strict=True)))
    return tuple(map(int, counts)) if rest == 0 and all(count.is_Integer for count in counts) else None


def _is_exchange(node: fx.Node) -> bool:
    kind = KINDS.get(node.target)
    return kind is not None and kind.forward == "all-to-all"


def _is_part(arg: object) -> TypeGuard[fx.Node]:
    return isinstance(arg, fx.Node) and arg.target is operator.getitem


def _total(group: list[Collective], context: Context) -> Traffic:
    total = sympy.expand(sum(collective.size_bytes for collective in group))
    return Traffic(group[0].kind, group[0].direction, len(group), per_token(total, context), spell(total))
