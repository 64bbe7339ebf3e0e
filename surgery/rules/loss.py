"""Losses: every rank sums over its own tokens and divides by the count over all tokens.

    cross_entropy(logits [B*S/P, V], labels [B*S])  ->  all_reduce(local sum / count over the whole labels)

Labels are integers and whole on every rank, so the count needs no communication, and a rank whose labels are all
ignored contributes zero instead of 0/0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.collectives import sharded_cross_entropy, sharded_nll_loss
from surgery.placement import PARTIAL, REPLICATED, Placement, Replicated, Sharded
from surgery.rules.call import Call, Step
from surgery.rules.table import rule

REDUCTION_NONE = 0
CLASS_DIM = 1
REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "aten::cross_entropy_loss": sharded_cross_entropy,
    "aten::nll_loss": sharded_nll_loss,
    "aten::nll_loss_nd": sharded_nll_loss,
}


@rule(*REPLACEMENTS, family="loss")
def cross_entropy(call: Call) -> Step | None:
    logits, target, weight = (call.operand(name) for name in ("self", "target", "weight"))
    if logits is None or target is None or len(target.shape) != len(logits.shape) - 1:
        return None
    if not isinstance(logits.placement, Sharded) or logits.placement.dim == CLASS_DIM:
        return None
    labels = logits.placement.moved_to(max(logits.placement.dim - 1, 0))
    required: dict[object, Placement] = {logits.node: logits.placement, target.node: labels}
    if weight is not None:
        required[weight.node] = REPLICATED
    operands = tuple(required[operand.node] for operand in call.operands)
    if call.arguments["reduction"] == REDUCTION_NONE:
        return Step(operands, (labels,))
    if not isinstance(target.placement, Replicated):
        return None
    replacement = REPLACEMENTS[call.node.target._schema.name]  # type: ignore[union-attr]
    return Step(operands, (PARTIAL,), replacement=replacement, whole=(("whole_target", target.node),))
