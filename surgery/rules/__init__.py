"""The rule table: how each ATen operation runs on sequence shards. Read it to learn how sequence parallelism works.

A rule is a function `Call -> Step | None`. It sees the operation with at least one operand `Sharded` and answers which
placements its operands must have and which its results then get; None means "not on shards": the operands are gathered
(or `transform` refuses, with `on_unknown="refuse"`). An operation without a row is treated the same: nothing is
assumed to be harmless. One layer of a decoder, and its loss, with P ranks:

    ids [B, S] replicated
    embedding       [V, H], ids [B, S/P]             sharded(1)   indexing.py       ids are sliced: integers are cheap
    rms_norm over H [B, S/P, H]                      sharded(1)   normalization.py  each token by itself
    linear          [B, S/P, H] x [N*D, H]           sharded(1)   contraction.py    the sequence is a free dimension
    view, transpose [B, S/P, N*D] -> [B, N, S/P, D]  sharded(2)   views.py          the sequence moves
    mul by cos      [B, N, S/P, D] * [1, 1, S, D]    sharded(2)   pointwise.py      what broadcasts is sliced along
    attention       q, k, v [B, N, S/P, D]           sharded(2)   attention.py      mixes tokens: exchanged for heads
    add             [B, S/P, H] + [B, S/P, H]        sharded(1)   pointwise.py
    cumsum over S   [B, S, H]                        replicated   along_dim.py      mixes tokens: None, gathered
    cross_entropy   [B*S/P, V], labels [B*S/P]       partial sum  loss.py           local sum over whole count
    all_reduce                                       replicated                     inserted, like all conversions

No row says anything of a backward. A cotangent is partial: each rank computes an addend of it, from its own tokens. A
local operation's own backward maps addends to addends, because every backward is linear; and conversions come in
adjoint pairs (slice and zero-pad, all-gather and reduce-scatter, all-reduce and all-reduce). So the addends of every
parameter's gradient add up to the unsharded one.

Begin with `placement.py` beside this folder and `call.py`; then the families, from the plainest on:

    family          what stays local                                        file
    pointwise       everything (broadcast operands are sliced along)         pointwise.py
    views           the sequence factor is followed through the reshape      views.py
    along-dim       softmax, sort, split, ... over other dims                along_dim.py
    normalization   norms over other dims                                    normalization.py
    joining         cat, stack, pad, repeat along other dims                 joining.py
    indexing        lookups in replicated tables                             indexing.py
    contraction     free and batch dims; both contracted: a partial sum      contraction.py
    reduction       other dims; sum and mean over tokens: a partial sum      reduction.py
    loss            local sum over whole count                               loss.py
    attention       q, k, v sharded; exchanged by insert-all-to-all          attention.py
    creation        zeros, full, ...: built at local size                    creation.py
    random          elements drawn one by one: each rank draws its own       random.py

`creation`, `random` and `expand` have rows that also *create* shards, where no operand is one: a floating result with a
sequence dimension is not to be whole on every rank.
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
    joining,
    loss,
    normalization,
    pointwise,
    random,
    reduction,
    views,
)
