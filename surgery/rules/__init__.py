"""The rule table: how each ATen operation runs on sequence shards. Read it to learn how sequence parallelism works.

A rule is a function `Call -> Step | None`. It sees the operation with at least one operand `Sharded` and answers which
placements its operands must have and which its results then get; None means "not on shards": the operands are gathered
(or `transform` refuses, with `on_unknown="refuse"`). An operation without a row is treated the same: nothing is
assumed to be harmless.

    family          what stays local                                    file
    pointwise       everything (broadcast operands are sliced along)     pointwise.py
    views           the sequence factor is followed through the reshape  views.py
    contraction     free and batch dims; both contracted: a partial sum  contraction.py
    reduction       other dims; sum and mean over tokens: a partial sum  reduction.py
    along-dim       softmax, sort, split, cat, ... over other dims       along_dim.py
    indexing        lookups in replicated tables                         indexing.py
    creation        zeros, full, ...: built at local size                creation.py
    attention       q, k, v sharded; exchanged by insert-all-to-all      attention.py
    loss            local sum over whole count                           loss.py
    random          elements drawn one by one: each rank draws its own   random.py
"""

from surgery.rules.call import Call, Operand, Rule, Step
from surgery.rules.table import RULES, family_of, find_rule, rule

__all__ = ["RULES", "Call", "Operand", "Rule", "Step", "family_of", "find_rule", "rule"]

from surgery.rules import (  # noqa: F401  (each import fills its rows of the table)
    along_dim,
    attention,
    contraction,
    creation,
    indexing,
    loss,
    pointwise,
    random,
    reduction,
    views,
)
