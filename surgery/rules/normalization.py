"""Normalization over the last dimensions: each token by itself, if the sequence is not among them.

layer_norm over H        [B, S/P, H], weight [H]   -> [B, S/P, H]
layer_norm over S and H                            -> gathered
"""

from __future__ import annotations

from surgery.rules.call import Call, Step
from surgery.rules.pointwise import align
from surgery.rules.table import rule


@rule("aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm", family="normalization")
def normalize(call: Call) -> Step | None:
    ndim = len(call.shape)
    if call.source is None or call.source.dim >= ndim - len(call.arguments["normalized_shape"]):
        return None
    weights = (align(operand, call.source, ndim) for operand in call.operands[1:])
    return Step((call.source, *weights), (call.source,) * len(call.results))
