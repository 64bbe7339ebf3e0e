"""Views and reorderings: the sequence factor is followed to wherever the reshape puts it.

    reshape   [B, S/P, N*H] -> [B, S/P, N, H]       the size argument S becomes S/P
    reshape   [B, S/P, H]   -> [B*S/P, H]           Sharded(0, outer=B)
    permute   [B, S/P, N, H] -> [B, N, S/P, H]
    reshape   [B, S/P, H]   -> [B, S/(4P), 4, H]    no dimension holds the whole sequence: gathered

A `view` has become a `reshape` before the rules see it: `passes/relax_views.py`.
"""

from __future__ import annotations

from surgery.placement import ONE, REPLICATED, Sharded
from surgery.rules.call import Call, Step
from surgery.rules.table import rule
from surgery.shapes import elements_around, length_of, only_length_dim, place_in

SIZES = {"aten::reshape": "shape", "aten::unflatten": "sizes"}


@rule(*SIZES, "aten::flatten", "aten::squeeze", "aten::unsqueeze", "aten::reshape_as", family="views")
def reshape(call: Call) -> Step | None:
    shape, source = call.operands[0].shape, call.source
    if source is None:
        return None
    before, after = elements_around(shape, source)
    result = place_in(call.shape, before, after, length_of(shape, source))
    if result is None:
        return None
    operands = (source, *(result for _ in call.operands[1:]))
    name = call.node.target._schema.name  # type: ignore[union-attr]
    first = call.dim() if name == "aten::unflatten" else 0
    return Step(operands, (result,), sizes=SIZES.get(name), first_size_dim=first)


PERMUTATIONS = ("aten::permute", "aten::transpose", "aten::t", "aten::movedim", "aten::swapaxes", "aten::swapdims")


@rule(*PERMUTATIONS, family="views")
def permute(call: Call) -> Step | None:
    _, source = call.lead
    return Step((source,), (source.moved_to(permutation(call).index(source.dim)),))


def permutation(call: Call) -> list[int]:
    """Which source dimension each result dimension comes from."""
    ndim = len(call.operands[0].shape)
    order = list(range(ndim))
    arguments = call.arguments
    if "dims" in arguments:
        return [int(dim) % ndim for dim in arguments["dims"]]
    if "source" in arguments:
        return _moved(arguments["source"], arguments["destination"], ndim)
    first, second = (("dim0", "dim1") if "dim0" in arguments else ("axis0", "axis1")) if ndim > 1 else ("", "")
    one, other = (int(arguments.get(name, i)) % ndim for i, name in enumerate((first, second)))
    order[one], order[other] = order[other], order[one]
    return order


def _moved(source: int | list[int], destination: int | list[int], ndim: int) -> list[int]:
    sources = [d % ndim for d in (source if isinstance(source, (list, tuple)) else [source])]
    targets = [d % ndim for d in (destination if isinstance(destination, (list, tuple)) else [destination])]
    rest = iter(dim for dim in range(ndim) if dim not in sources)
    return [sources[targets.index(dim)] if dim in targets else next(rest) for dim in range(ndim)]


@rule("aten::expand", "aten::expand_as", "aten::broadcast_to", family="views", creates=True)
def expand(call: Call) -> Step | None:
    """`[1, S/P, H] -> [B, S/P, H]`, and `[H] -> [B, S/P, H]`: that makes shards of what is whole."""
    source = call.operands[0]
    result = _expanded_placement(call)
    if result is None:
        return None
    dim = result.dim - (len(call.shape) - len(source.shape))
    is_broadcast = dim < 0 or source.shape[dim] == ONE
    lead = REPLICATED if is_broadcast else result.moved_to(dim)
    sizes = "size" if "size" in call.arguments else None
    return Step((lead, *(result for _ in call.operands[1:])), (result,), sizes=sizes)


def _expanded_placement(call: Call) -> Sharded | None:
    if call.source is not None:
        return call.source.moved_to(call.source.dim + len(call.shape) - len(call.operands[0].shape))
    dim = only_length_dim(call.shape, call.lengths)
    return Sharded(dim) if dim is not None else None
