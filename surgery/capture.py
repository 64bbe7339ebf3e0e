"""Capture: a Hugging Face model and a call signature become one flat graph, with one node per attention call.

placeholders     the call's tensors, in the order of the signature
get_attr         parameters and buffers by qualified name, looked up on the live model when the graph runs
call_function    ATen operations, surgery::attention, surgery::attention_mask
output           the flat outputs of the model's output class
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from surgery.branches import Sides, describe_branches
from surgery.culprits import find_place, trace_around
from surgery.custom_backward import refuse_custom_backward
from surgery.errors import CaptureError, UnsupportedOperationError
from surgery.host_randomness import refused_host_randomness
from surgery.manners import Manner
from surgery.metadata import Skip
from surgery.opaque import InputSizes, OpaqueCall, OpaqueModules
from surgery.private import UserError, export_patches, functionalized, refused_specialization, told_eager
from surgery.recorded import RecordedCall, RecordedMask, Recording
from surgery.recording import recorded_attention
from surgery.shapes import Lengths, to_expr
from surgery.signature import Signature, TensorInput
from surgery.stand_ins import as_unsharded

TRACEABLE = {"_experts_implementation": "grouped_mm", "use_cache": False}
WRITTEN = ("problem_type",)
EXAMPLE_COUNT = 3
SEQUENCE_NAMES = {"s": "sequence", "t": "decoder_sequence"}
MOST_REFINEMENTS = 4


@dataclass
class Capture:
    """A captured graph, and what is needed to call it and to read its outputs."""

    graph: fx.Graph
    lengths: Lengths
    batch: sympy.Symbol | None
    output_spec: pytree.TreeSpec
    constants: dict[str, Tensor] = field(default_factory=dict)
    assumptions: list[sympy.Basic] = field(default_factory=list)
    calls: list[RecordedCall] = field(default_factory=list)
    masks: list[RecordedMask] = field(default_factory=list)
    opaque_calls: tuple[OpaqueCall, ...] = ()
    attempts: tuple[Skip, ...] = ()
    sides: Sides = ()


def capture(model: nn.Module, signature: Signature, example: tuple[int, ...], sides: Sides | None = None) -> Capture:
    """Trace `model` for `signature` with `torch.export` on an example of these sizes: B sequences of S tokens (and T).

    An example of one is captured for just that size: torch.export specializes ones. Modules that cannot be traced
    become opaque (`surgery/opaque.py`). `sides` are those to take of branches on data (`surgery/branches.py`).

    Raises `CaptureError` where the model cannot be exported whole, or only for one sequence length.
    """
    if not signature.letters:
        raise CaptureError(f"expected sequences of two tokens or more, found {signature} of one. Pad it to two.")
    manner = Manner(sides)
    while True:
        try:
            captured, attempts = trace_around(model, partial(_trace, model, signature, example, manner))
        except CaptureError as error:
            if not manner.advance(error):
                raise
        else:
            captured.attempts = (*attempts, *describe_branches(captured.graph))
            return captured


def _trace(
    model: nn.Module, signature: Signature, example: tuple[int, ...], manner: Manner, opaque: OpaqueModules
) -> Capture:
    sizes = InputSizes()
    with ExitStack() as stack:
        recording = stack.enter_context(recorded_attention(model))
        stack.enter_context(_traceable_config(model))
        stack.enter_context(_without_checkpointing(model))
        stack.enter_context(_without_saving())
        stack.enter_context(as_unsharded(model))
        stack.enter_context(refuse_custom_backward())
        stack.enter_context(export_patches())
        stack.enter_context(refused_specialization(SpecializedError))
        stack.enter_context(told_eager(model) if manner.is_told_eager else nullcontext())
        stack.enter_context(refused_host_randomness(f"the forward of {type(model).__name__}"))
        stack.enter_context(opaque.recorded(sizes))
        stack.enter_context(_flat_forward(model, signature, recording, sizes))
        try:
            program, ranges = _export(model, signature, example, manner)
            if any(_is_mutable(node) for node in program.graph.nodes):
                program = functionalized(program)
        except CaptureError:
            raise
        except Exception as error:
            stopped = f"{_first_lines(error)}{find_place(error)}"
            raise CaptureError(
                f"torch.export cannot capture {type(model).__name__} for {signature}: {stopped}. "
                "Expected a forward without data-dependent control flow, dynamic in batch and sequence length. "
                "Run the model's code through torch.export.export(strict=False) to see where it stops."
            ) from error
    captured = _to_capture(program, signature)
    for length, dim in zip(captured.lengths, ranges, strict=True):
        captured.assumptions += [sympy.Ge(length, dim.min)] if dim.min else []
        captured.assumptions += [sympy.Le(length, dim.max)] if isinstance(dim.max, int) else []
    captured.calls, captured.masks = recording.calls, recording.masks
    captured.opaque_calls, captured.sides = tuple(opaque.calls), manner.taken
    return captured


class SpecializedError(CaptureError):
    """The model's code needs, as a plain number, a size that varies from call to call: to loop over tokens, mostly."""

    def __init__(self) -> None:
        super().__init__("the code needs as a number a size that varies from call to call")


def _export(
    model: nn.Module, signature: Signature, example: tuple[int, ...], manner: Manner
) -> tuple[ExportedProgram, list[Dim]]:
    """The exported program, and the range of each sequence length that it serves.

    A table of positions bounds them from above, a convolution's kernel from below, a branch on the length on its side.
    torch.export says so when it fails, and is asked again.
    """
    sizes = dict(zip(("b", *signature.letters), example, strict=True))
    examples = {tensor.name: _example(tensor, sizes) for tensor in signature.tensors}
    dims = {"b": Dim("batch"), "n": Dim("count")}
    dims |= {letter: Dim(SEQUENCE_NAMES[letter]) for letter in signature.letters}
    for remaining in reversed(range(MOST_REFINEMENTS)):
        try:
            with manner.follow():
                program = torch.export.export(
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
        else:
            return program, [dims[letter] for letter in signature.letters]
    raise AssertionError("the last refinement either returns or raises")


def _refine(dims: dict[str, Dim], error: UserError) -> bool:
    """Narrow `dims` to the ranges that `error` suggests; False where it suggests another thing than ranges."""
    try:
        refined = refine_dynamic_shapes_from_suggested_fixes(error.msg, {letter: (dims[letter],) for letter in dims})
    except (UserError, AssertionError):
        return False
    assert isinstance(refined, dict)
    suggested = {letter: dim for letter, (dim,) in refined.items()}
    if any(type(dim) is not Dim for dim in suggested.values()):  # an int or a multiple is no range
        return False
    dims.update(suggested)
    return True


def _dynamic_shapes(signature: Signature, sizes: dict[str, int], dims: dict[str, Dim]) -> dict[str, dict[int, Dim]]:
    dynamic = {letter: dim for letter, dim in dims.items() if sizes.get(letter, EXAMPLE_COUNT) > 1}
    return {
        tensor.name: {d: dynamic[str(size)] for d, size in enumerate(tensor.dims) if size in dynamic}
        for tensor in signature.tensors
    }


def _example(tensor: TensorInput, sizes: dict[str, int]) -> Tensor:
    letters = {**sizes, "n": EXAMPLE_COUNT}
    shape = [letters[dim] if isinstance(dim, str) else dim for dim in tensor.dims]
    return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)


def _first_lines(error: Exception) -> str:
    """What an exporter's message says first: its first two lines, as the second often has the cause."""
    lines = [line.strip(" -.") for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[:2])[:500] if lines else type(error).__name__


@contextmanager
def _flat_forward(model: nn.Module, signature: Signature, recording: Recording, sizes: InputSizes) -> Iterator[None]:
    """Give the model a forward with exactly the signature's tensors as parameters, which reads their sizes."""
    installed = model.__dict__.pop("forward", None)
    original = model.forward

    def forward(**tensors: Tensor) -> Any:
        recording.tensors = tensors
        sizes.read((tensors[tensor.name], tensor.dims) for tensor in signature.tensors)
        return original(**tensors, **dict(signature.constants))

    parameters = [inspect.Parameter(t.name, inspect.Parameter.KEYWORD_ONLY) for t in signature.tensors]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    try:
        model.forward = forward
        yield
    finally:
        del model.forward
        if installed is not None:
            model.forward = installed


@contextmanager
def _traceable_config(model: nn.Module) -> Iterator[None]:
    """Ask for experts without loops over data and for no cache, for the trace, where the configs have a say.

    What a traced forward writes into its config (the kind of labels it was first given) is taken back: the labels of
    an example must not decide for those of a later call.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    previous = [
        (c, name, getattr(c, name)) for c in configs.values() for name in (*TRACEABLE, *WRITTEN) if hasattr(c, name)
    ]
    try:
        for config, name, _ in previous:
            setattr(config, name, TRACEABLE.get(name, getattr(config, name)))
        yield
    finally:
        for config, name, value in previous:
            setattr(config, name, value)


@contextmanager
def _without_saving() -> Iterator[None]:
    """Keep the caller's saved-tensor hooks (offloading, counting) away from what the trace saves: it has no memory."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Trace layers as they are; `surgery/checkpointing.py` cuts them out of the finished graph."""
    switched_on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in switched_on:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in switched_on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _to_capture(program: ExportedProgram, signature: Signature) -> Capture:
    """Turn lifted parameters into `get_attr` nodes on the live model, and find the symbols of the sizes."""
    _refuse_mutations(program)
    graph = program.graph_module.graph
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    constants: dict[str, Tensor] = {}
    inputs: list[fx.Node] = []
    for node in list(graph.find_nodes(op="placeholder")):
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
            continue
        assert spec.target is not None
        target = spec.target
        if spec.kind is InputKind.CUSTOM_OBJ:
            raise UnsupportedOperationError(
                f"the forward uses an object that a graph cannot hold ({spec.target}), such as a torch.Generator. "
                "Expected tensors, and random numbers of torch's default generators. Leave out generator=."
            )
        if spec.kind is InputKind.CONSTANT_TENSOR:
            constants[node.name] = program.constants[spec.target]
            target = f"surgery.constants.{node.name}"
        _replace_by_attribute(graph, node, target)
    names = [tensor.name for tensor in signature.tensors]
    if [node.name for node in inputs] != names:
        raise CaptureError(f"expected the graph's inputs to be {names}, found {[node.name for node in inputs]}")
    lengths = tuple(_length(letter, signature, inputs) for letter in signature.letters)
    batch = _size("b", signature, inputs)[1]
    spec = program.call_spec.out_spec
    assert spec is not None
    graph.owning_module = program.graph_module
    return Capture(graph, lengths, batch if isinstance(batch, sympy.Symbol) else None, spec, constants)


def _replace_by_attribute(graph: fx.Graph, node: fx.Node, target: str) -> None:
    body = next(other for other in graph.nodes if other.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(body):
        attribute = graph.create_node("get_attr", target, name=node.name)
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)


def _refuse_mutations(program: ExportedProgram) -> None:
    mutated = [s.target for s in program.graph_signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    if mutated:
        raise CaptureError(
            f"the forward writes to {mutated[0]}, a buffer or input. Expected a forward that only computes: "
            "ranks would keep different copies. Remove the buffer update, or run it outside the forward."
        )


def _length(letter: str, signature: Signature, inputs: list[fx.Node]) -> sympy.Symbol:
    name, length = _size(letter, signature, inputs)
    if not isinstance(length, sympy.Symbol):
        raise CaptureError(
            f"the model fixes the sequence length of {name} to {length} while it is traced. "
            "Expected a forward that works for any length: it branches on, or loops over, the length."
        )
    return length


def _size(letter: str, signature: Signature, inputs: list[fx.Node]) -> tuple[str, sympy.Expr | None]:
    """The symbol that stands for the size called `letter`, and an input that has it."""
    for tensor, node in zip(signature.tensors, inputs, strict=True):
        if letter in tensor.dims:
            return node.name, to_expr(node.meta["val"].shape[tensor.dims.index(letter)])
    return "", None
