"""Regions: modules that sort and permute tokens inside, yet map each token by itself.

    experts(tokens [B*S/P, H], ids [B*S/P, k], weights [B*S/P, k])  ->  [B*S/P, H]

A mixture of experts groups tokens by expert before it multiplies: no rule could follow them. Its contract can: tokens
in, the same tokens out, in order. Inside, every operation runs on the tokens of the rank as it stands, with sizes made
local. The contract is granted by class, to transformers' experts only, and proven by the
mixtral and gpt_oss rows of `tests/test_exactness.py`.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils import _pytree as pytree

from surgery.errors import UnsupportedOperationError
from surgery.metadata import NodeFacts, where
from surgery.placement import REPLICATED, Placement, Sharded
from surgery.rules.call import Call, Step, tensor_nodes
from surgery.shapes import Shape, counts_in, length_dims, quotient, shape_of

TOKEN_LOCAL_SUFFIX = "Experts"
TRUSTED_PACKAGE = "transformers.models."


def region_of(node: fx.Node) -> str | None:
    """The path of the token-local module that `node` was traced in, if it is in one."""
    for path, module_class in (node.meta.get("nn_module_stack") or {}).values():
        if is_region(module_class):
            return str(path)
    return None


def is_region(module_class: type | str) -> bool:
    """Whether a module of this class, or of this full name, is trusted to map each token by itself."""
    own = isinstance(module_class, type) and f"{module_class.__module__}.{module_class.__qualname__}"
    name = own or str(module_class)
    return name.startswith(TRUSTED_PACKAGE) and name.endswith(TOKEN_LOCAL_SUFFIX)


def find_regions(graph: fx.Graph) -> frozenset[str]:
    """The paths of the token-local modules in `graph`, but for those that read sizes from data.

    Tokens counted by expert are those of the whole batch: what is in such a module follows the rules, as elsewhere.
    """
    nodes = [(region, node) for node in graph.nodes if (region := region_of(node)) is not None]
    counting = {region for region, node in nodes if _has_counted_size(node)}
    return frozenset(region for region, _ in nodes if region not in counting)


def _has_counted_size(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    shapes = [shape_of(value) for value in values if isinstance(value, torch.Tensor)]
    return any(counts_in(size) for shape in shapes for size in shape)


def region_step(call: Call) -> Step:
    """Run `call` as it is on the tokens of this rank: what has a sequence dimension is a shard of it."""
    operands = tuple(
        operand.placement if operand.is_sharded else _shard_of(operand.shape, call) for operand in call.operands
    )
    return Step(operands, tuple(_shard_of(shape, call) for shape in call.results))


def check_border(node: fx.Node, facts: dict[fx.Node, NodeFacts]) -> None:
    """Refuse a region whose result is not the tokens that entered it."""
    placements = {facts[source].placement for source in _entering(node)}
    entering = {placement for placement in placements if isinstance(placement, Sharded)}
    if facts[node].placement not in entering:
        raise UnsupportedOperationError(
            f"{where(node)}: expected the experts to return the tokens they were given, in order; found a result "
            f"placed {facts[node].placement} from inputs placed {', '.join(map(str, entering)) or 'whole'}."
        )


def _entering(node: fx.Node) -> set[fx.Node]:
    """The values from outside that the region around `node` reads."""
    path, seen, pending, outside = region_of(node), {node}, [node], set()
    while pending:
        for source in tensor_nodes(pending.pop(), with_tuples=True):
            if region_of(source) != path:
                outside.add(source)
            elif source not in seen:
                seen.add(source)
                pending.append(source)
    return outside


def _shard_of(shape: Shape, call: Call) -> Placement:
    dims = length_dims(shape, call.lengths)
    if not dims:
        return REPLICATED
    outers = [quotient(shape[dims[0]], length) for length in call.lengths]
    outer = next((outer for outer in outers if outer is not None), None)
    if outer is None or len(dims) > 1:
        raise UnsupportedOperationError(f"{where(call.node)}: expected one dimension of tokens, found {shape}.")
    return Sharded(dims[0], outer)
