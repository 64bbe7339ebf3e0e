"""Matrix products, by labelled dimensions, as in einsum.

    linear   [B, S/P, i] x [o, i]            -> [B, S/P, o]       the sequence is free
    scores   [B, N, S/P, H] x [B, N, H, S]   -> [B, N, S/P, S]    keys are gathered: exact hand-written attention
    K^T V    [B, H, S/P] x [B, S/P, H]       -> [B, H, H]         contracted on both sides: a partial sum

The first sharded operand decides which dimension stays sharded; what is in its way is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters

from surgery.placement import ONE, PARTIAL, REPLICATED, Placement, Sharded
from surgery.rules.call import Call, Operand, Step
from surgery.rules.pointwise import align
from surgery.rules.table import rule

BROADCAST = "."


@dataclass(frozen=True)
class Factor:
    """One operand of a product, with one label a dimension; `BROADCAST` marks a dimension of size 1."""

    operand: Operand
    labels: str

    def placed(self, label: str, lead: Sharded) -> Placement:
        return lead.moved_to(self.labels.index(label)) if label in self.labels else REPLICATED


def contract(call: Call, factors: list[Factor], result: str, added: Operand | None = None) -> Step | None:
    """The step for a product of `factors` whose result has the labels `result`, plus a broadcast addend."""
    lead = next((factor for factor in factors if factor.operand.is_sharded), None)
    if lead is None or not isinstance(lead.operand.placement, Sharded):
        return None
    label = lead.labels[lead.operand.placement.dim]
    required = {factor.operand.node: factor.placed(label, lead.operand.placement) for factor in factors}
    if len(required) < len(factors):
        return None
    if label not in result:
        is_exact = added is None and all(label in factor.labels for factor in factors)
        return Step(tuple(required.values()), (PARTIAL,)) if is_exact else None
    target = lead.operand.placement.moved_to(result.index(label))
    if added is not None:
        required[added.node] = align(added, target, len(result))
    return call.step(required, target)


def labels(count: int, *, skip: int = 0) -> str:
    return ascii_letters[skip : skip + count]


def product_labels(left: Operand, right: Operand) -> tuple[str, str, str]:
    """The labels of `left @ right`, whose batch dimensions broadcast."""
    batch = max(len(left.shape), len(right.shape)) - 2
    names, row, inner, column = labels(max(batch, 0), skip=3), "a", "b", "c"
    one = _batched(names, left) + (row + inner if len(left.shape) > 1 else inner)
    other = _batched(names, right) + (inner + column if len(right.shape) > 1 else inner)
    kept = (row if len(left.shape) > 1 else "") + (column if len(right.shape) > 1 else "")
    return one, other, names + kept


def _batched(names: str, operand: Operand) -> str:
    count = max(len(operand.shape) - 2, 0)
    own = names[len(names) - count :]
    return "".join(BROADCAST if operand.shape[i] == ONE else name for i, name in enumerate(own))


@rule("aten::linear", family="contraction")
def linear(call: Call) -> Step | None:
    """`[B, S/P, i], weight [o, i], bias [o] -> [B, S/P, o]`; the weight's gradient is an addend, as all are."""
    source, weight = call.operand("input"), call.operand("weight")
    if source is None or weight is None or len(weight.shape) != 2:
        return None
    free = labels(len(source.shape) - 1, skip=2)
    return contract(call, [Factor(source, free + "a"), Factor(weight, "ba")], free + "b", call.operand("bias"))


@rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", family="contraction")
def matmul(call: Call) -> Step | None:
    """`[B, N, S/P, H] @ [B, N, H, S] -> [B, N, S/P, S]`, and all else of rows, columns and batches."""
    if len(call.operands) != 2:
        return None
    left, right = call.operands
    one, other, result = product_labels(left, right)
    return contract(call, [Factor(left, one), Factor(right, other)], result)


@rule("aten::addmm", "aten::baddbmm", family="contraction")
def addmm(call: Call) -> Step | None:
    """`added [o] + [B*S/P, i] @ [i, o] -> [B*S/P, o]`: what is added is broadcast."""
    if len(call.operands) != 3:
        return None
    added, left, right = call.operands
    one, other, result = product_labels(left, right)
    return contract(call, [Factor(left, one), Factor(right, other)], result, added)


@rule("aten::einsum", family="contraction")
def einsum(call: Call) -> Step | None:
    """`"bsi,oi->bso"`, as it is written; without diagonals and dots."""
    equation = str(call.arguments["equation"]).replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    sources, result = equation.split("->")
    terms = sources.split(",")
    if len(terms) != len(call.operands) or any(len(set(term)) < len(term) for term in terms):
        return None
    factors = [Factor(operand, _named(term, operand)) for operand, term in zip(call.operands, terms, strict=True)]
    return contract(call, factors, result)


def _named(term: str, operand: Operand) -> str:
    return "".join(BROADCAST if size == ONE else name for name, size in zip(term, operand.shape, strict=True))
