"""Losses: every rank sums over its own tokens and divides by the count over all tokens.

    cross_entropy(logits [B*S/P, V], labels [B*S])  ->  all_reduce(local sum / count over the whole labels)

Labels are integers and whole on every rank, so the count needs no communication, and a rank whose labels are all
ignored contributes zero instead of 0/0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgery.placement import PARTIAL, REPLICATED, Placement, Replicated, Sharded
from surgery.rules.call import Call, Step
from surgery.rules.table import is_call, rule

REDUCTION_NONE, REDUCTION_MEAN = 0, 1


@rule("aten::cross_entropy_loss", "aten::nll_loss", "aten::nll_loss_nd", family="loss")
def cross_entropy(call: Call) -> Step | None:
    """`logits [B*S/P, V], labels [B*S/P]` -> an addend; `[B, V, S/P]` too, with labels `[B, S/P]`."""
    logits, target, weight = (call.operand(name) for name in ("self", "target", "weight"))
    if logits is None or target is None or len(target.shape) != len(logits.shape) - 1:
        return None
    class_dim = min(1, len(target.shape))
    if not isinstance(logits.placement, Sharded) or logits.placement.dim == class_dim:
        return None
    labels = logits.placement.moved_to(max(logits.placement.dim - 1, 0))
    required: dict[fx.Node, Placement] = {logits.node: logits.placement, target.node: labels}
    if weight is not None:
        required[weight.node] = REPLICATED
    if call.arguments["reduction"] == REDUCTION_NONE:
        return call.step(required, labels)
    if not isinstance(target.placement, Replicated):
        return None
    is_of_logits = is_call(call.node, "aten::cross_entropy_loss")
    replacement: Callable[..., Tensor] = sharded_cross_entropy if is_of_logits else sharded_nll_loss
    return replace(call.step(required, PARTIAL), replacement=replacement, whole=(("whole_target", target.node),))


def sharded_cross_entropy(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    *,
    whole_target: Tensor,
) -> Tensor:
    """This rank's addend of a cross-entropy; `reduction` as in ATen (1 mean, 2 sum)."""
    addend = F.cross_entropy(
        self, target, weight, ignore_index=int(ignore_index), reduction="sum", label_smoothing=label_smoothing
    )
    return _reduced(addend, whole_target, weight, reduction, ignore_index)


def sharded_nll_loss(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    *,
    whole_target: Tensor,
) -> Tensor:
    """This rank's addend of a negative log-likelihood; `reduction` as in ATen (1 mean, 2 sum)."""
    addend = F.nll_loss(self, target, weight, ignore_index=int(ignore_index), reduction="sum")
    return _reduced(addend, whole_target, weight, reduction, ignore_index)


def _reduced(addend: Tensor, labels: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Tensor:
    """A rank's sum as its addend of the result: of a mean over all of the labels, or of their sum."""
    if reduction != REDUCTION_MEAN:
        return addend
    return addend / _label_weight(labels, weight, ignore_index).to(addend.dtype)


def _label_weight(labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean over labels divides by: their count, or the sum of their classes' weights."""
    counted = labels != ignore_index
    if weight is None:
        return counted.sum()
    return torch.where(counted, weight[torch.where(counted, labels, 0)], 0).sum()
