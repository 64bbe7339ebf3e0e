"""Random numbers drawn element by element: each rank draws those of its own tokens.

    dropout(x [B, S/P, H])     ->  [B, S/P, H]      other numbers on every rank
    rand_like(x [B, S/P, H])   ->  [B, S/P, H]
    randn([B, S, H])           ->  [B, S/P, H]
    randn([H])                 ->  [H]              whole: the same on every rank

Which seed they draw from is the matter of `passes/seed_random_operations.py`. What draws for several elements at once
(multinomial, feature_dropout, randperm) has no row: it is gathered, and all ranks draw the same.
"""

from __future__ import annotations

from surgery.rules import creation
from surgery.rules.call import Call, Step
from surgery.rules.pointwise import pointwise
from surgery.rules.table import rule


@rule(
    "aten::bernoulli",
    "aten::dropout",
    "aten::exponential",
    "aten::native_dropout",
    "aten::normal_functional",
    "aten::rand_like",
    "aten::randint_like",
    "aten::randn_like",
    "aten::uniform",
    family="random",
)
def element_by_element(call: Call) -> Step | None:
    return pointwise(call)


@rule("aten::rand", "aten::randn", family="random", creates=True)
def created(call: Call) -> Step | None:
    return creation.create(call)
