"""Tensors made from nothing: a rank builds just its part.

    zeros([B, S, H])  ->  zeros([B, S/P, H])
    ones([B, S])      ->  ones([B, S])         one number a token: whole, as masks and positions are
    x.new_ones([S, S])    the same whole on every rank: of x [B, S/P, H] nothing but its dtype is read

Random tensors are in `random.py`.
"""

from __future__ import annotations

from surgery.placement import REPLICATED, Sharded
from surgery.rules.call import Call, Step
from surgery.rules.table import rule
from surgery.shapes import only_length_dim


@rule(
    "aten::empty",
    "aten::full",
    "aten::new_empty",
    "aten::new_full",
    "aten::new_ones",
    "aten::new_zeros",
    "aten::ones",
    "aten::zeros",
    family="creation",
    creates=True,
)
def create(call: Call) -> Step | None:
    dim = only_length_dim(call.shape, call.lengths)
    as_they_are = tuple(operand.placement for operand in call.operands)
    if dim is None or _is_one_number_a_token(call):
        return Step(as_they_are, (REPLICATED,))
    return Step(as_they_are, (Sharded(dim),), sizes="size")


def _is_one_number_a_token(call: Call) -> bool:
    has_features = any(size.is_Integer and size > 1 for size in call.shape)
    return not has_features and not call.sharded
