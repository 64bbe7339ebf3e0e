"""The call of `torch.export`: example inputs, which of their sizes are dynamic, and between which bounds.

input_ids [b, s]  ->  ones([2, 64]), batch and sequence dynamic
fails: "sequence = Dim('sequence', max=512)"  ->  asked again within that bound
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.export.graph_signature import InputSpec

from surgery.capture.fallbacks import Fallbacks
from surgery.errors import CaptureError
from surgery.inputs.signature import SHORTEST, SMALLEST, Signature, TensorInput
from surgery.private import UserError, root_of

DIM_NAMES = {"s": "sequence", "t": "decoder_sequence"}
EXAMPLE_COUNT = 3
"""The size, in an example, of a dimension that has its own length on every call."""
MOST_REFINEMENTS = 4
SLICED = re.compile(r"\.slice\((None|\d+), [^,]*, (None|\d+)\)\.(\d+)")


Dims = dict[str, Dim]


def export_model(
    model: nn.Module,
    signature: Signature,
    example: tuple[int, ...],
    fallbacks: Fallbacks,
    divisors: Mapping[str, int],
) -> ExportedProgram:
    """The exported program, for ranges of the batch size and of each sequence's length that torch finds.

    A table of positions bounds a length from above, a convolution's kernel from below, a branch on a size on its side.
    Tokens in groups of four make it a multiple of 4, or one more. torch.export says so as it fails, and is asked anew.
    `divisors` are those that it asked for before: tried first.
    """
    sizes = dict(zip(("b", *signature.letters), example, strict=True))
    if divisors:
        try:
            return _export(model, signature, sizes, fallbacks, _make_dims(signature, sizes, divisors))
        except CaptureError:
            raise
        except Exception:
            pass  # this length is on a side of the model's branches where it is divided by another number, or by none
    return _export(model, signature, sizes, fallbacks, _make_dims(signature, sizes, {}))


def _make_dims(signature: Signature, sizes: Mapping[str, int], divisors: Mapping[str, int]) -> Dims:
    dims = {"b": Dim("batch"), "n": Dim("count")}
    for letter in signature.letters:
        name, divisor = DIM_NAMES[letter], divisors.get(letter, 1)
        quotient, residue = divmod(sizes[letter], divisor)
        if divisor > 1 and quotient >= SMALLEST:
            dims[letter] = divisor * Dim(f"_{name}", min=SMALLEST) + residue
        else:
            dims[letter] = Dim(name, min=min(SHORTEST[letter], sizes[letter]))
    return dims


def _export(
    model: nn.Module, signature: Signature, sizes: dict[str, int], fallbacks: Fallbacks, dims: Dims
) -> ExportedProgram:
    examples = {tensor.name: _example(tensor, sizes) for tensor in signature.tensors}
    for remaining in reversed(range(MOST_REFINEMENTS)):
        try:
            with fallbacks.follow():
                return torch.export.export(
                    model,
                    (),
                    examples,
                    dynamic_shapes=_dynamic_shapes(signature, sizes, dims),
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
        except UserError as error:
            if not remaining or not _refine(dims, error):
                raise
    raise AssertionError("the last refinement either returns or raises")


def name_modules_by_index(nodes: Iterable[fx.Node]) -> None:
    """Let nodes say that they were traced in `layers.3` where they say `layers.slice(1, 4, None).2`.

    torch.export does, of a model that holds a module twice, and loops over a part of a list of modules.
    """
    for node in nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any(SLICED.search(path) for path, _ in stack.values()):
            indexed = {key: (SLICED.sub(_index, path), kind) for key, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = indexed


def _index(part: re.Match[str]) -> str:
    start, step = (default if text == "None" else int(text) for text, default in ((part[1], 0), (part[2], 1)))
    return f".{start + step * int(part[3])}"


def specs_by_name(program: ExportedProgram) -> dict[str, InputSpec]:
    """What each placeholder of a program's graph is: a parameter, a buffer, an input."""
    return {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}


def _refine(dims: Dims, error: UserError) -> bool:
    """Narrow `dims` to the ranges that `error` suggests; False where it suggests another thing than ranges."""
    try:
        refined = refine_dynamic_shapes_from_suggested_fixes(error.msg, {letter: (dims[letter],) for letter in dims})
    except (UserError, AssertionError):
        return False
    assert isinstance(refined, dict)
    suggested = {letter: dim for letter, (dim,) in refined.items()}
    if any(isinstance(dim, int) for dim in suggested.values()):
        return False
    if str(suggested["n"]) != str(dims["n"]) or root_of(suggested["b"]) is not suggested["b"]:
        return False  # no program is found by those
    if any(root_of(dim) is not dim and _is_tied(dim, suggested) for dim in suggested.values()):
        return False
    dims.update(suggested)
    return True


def _is_tied(multiple: Dim, dims: Dims) -> bool:
    """Whether another length follows from the same number: a graph would be for no length but that one's."""
    return sum(root_of(dim).__name__ == root_of(multiple).__name__ for dim in dims.values()) > 1


def _dynamic_shapes(signature: Signature, sizes: dict[str, int], dims: Dims) -> dict[str, dict[int, Dim]]:
    dynamic = {letter: dim for letter, dim in dims.items() if sizes.get(letter, EXAMPLE_COUNT) > 1}
    return {
        tensor.name: {d: dynamic[str(size)] for d, size in enumerate(tensor.dims) if size in dynamic}
        for tensor in signature.tensors
    }


def _example(tensor: TensorInput, sizes: dict[str, int]) -> Tensor:
    letters = {**sizes, "n": EXAMPLE_COUNT}
    shape = [letters[dim] if isinstance(dim, str) else dim for dim in tensor.dims]
    return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)
