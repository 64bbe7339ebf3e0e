"""Whether the ranks of one head may share its queries: where there are more ranks than heads.

Only functions that treat each query alike, whatever stands beside it, can be called on some of them. Of torch's and
transformers' own that is known. For any other, one rank attends with the head and the others wait: exact, but idle.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from surgery.attention.operators import MASK
from surgery.attention.recorded import TENSOR_MASKS, RecordedCall
from surgery.exchange.own_heads import PER_HEAD, PER_ROW, WITHOUT_HEADS
from surgery.metadata import Context, Site, facts_of
from surgery.placement import REPLICATED
from surgery.rules.attention import SEQUENCE_DIM
from surgery.rules.call import bind_arguments
from surgery.shapes import length_dims, shape_of

KNOWN = {*PER_HEAD, *WITHOUT_HEADS}
NUM_DIMS = 4
MODELS, EAGER = "transformers.models.", "eager_attention_forward"


def why_rows_stay_whole(site: Site, context: Context) -> str | None:
    """Why one rank must attend with all queries of a head; None where more of them may."""
    given = bind_arguments(site.node)
    if facts_of(given["key"]).placement == REPLICATED:
        return "its keys are whole on every rank"
    if site.call is not None and not is_row_wise(site.call):
        return f"the attention function {site.call.implementation!r} is not known to take each query by itself"
    keywords = site.call.keywords(given["extras"], given["sizes"]) if site.call is not None else {}
    length = shape_of(given["query"].meta["val"])[SEQUENCE_DIM]
    strange = sorted(name for name, value in keywords.items() if name not in KNOWN and _varies(value, length))
    if strange:
        return f"{', '.join(strange)} may have entries for each query"
    cut = [(given["mask"], SEQUENCE_DIM), *((keywords.get(name), dim) for name, dim in PER_ROW.items())]
    if not all(x is None or _has_rows(x, dim, length, context) for x, dim in cut):
        return "its mask or bias has neither a row for each query nor one for all"
    return None


def _varies(value: Any, length: sympy.Expr) -> bool:
    """Whether a keyword has a tensor in it that has a dimension for the queries."""
    leaves = [leaf.meta["val"] for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]
    shapes = [shape_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return any(length_dims(shape, tuple(length.free_symbols)) for shape in shapes)


def _has_rows(x: fx.Node, dim: int, length: sympy.Expr, context: Context) -> bool:
    """Whether a [B, N, T, S] has a row for each of `length` queries, or one for all, in `dim`, and is a tensor."""
    maker = bind_arguments(x)["maker"] if x.target is MASK else None
    is_tensor = maker is None or context.masks[maker].function in TENSOR_MASKS
    shape = shape_of(x.meta["val"])
    return is_tensor and len(shape) == NUM_DIMS and shape[dim] in (length, 1)


def is_row_wise(call: RecordedCall) -> bool:
    """Whether what the function makes of a query does not depend on the queries beside it.

    All eager attention of transformers' models is softmax(query @ keys + mask) @ values, with scores capped or with
    sinks besides; `tests/test_rows.py` reads it.
    """
    function = call.function
    is_eager = call.implementation == "eager" and function.__module__.startswith(MODELS)
    return function is sdpa_attention_forward or (is_eager and function.__name__.endswith(EAGER))
