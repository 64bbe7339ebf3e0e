"""Capture: a Hugging Face model and a call signature become one flat graph, with one node per attention call.

placeholders     the call's tensors, in the order of the signature
get_attr         parameters and buffers by qualified name, looked up on the live model when the graph runs
call_function    ATen operations, surgery::attention, surgery::attention_mask
output           the flat outputs of the model's output class
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.utils import _pytree as pytree

from passes.inline_blocks import AUTOCAST, SET_GRAD
from surgery.attention.recorded import RecordedCall, RecordedMask, Recording
from surgery.capture.branches import Sides, describe_branches
from surgery.capture.buffer_writes import drop_buffer_writes
from surgery.capture.candidates import ModuleClass
from surgery.capture.culprits import trace_around
from surgery.capture.custom_backward import refuse_custom_backward, refuse_nonlinear_operators
from surgery.capture.exporting import export_model, name_modules_by_index, specs_by_name
from surgery.capture.fallbacks import Fallbacks
from surgery.capture.gradless_writes import refuse_gradless_writes, written_by
from surgery.capture.host_randomness import refused_host_randomness
from surgery.capture.in_place import without_writes
from surgery.capture.opaque import OpaqueModules
from surgery.capture.opaque_calls import InputSizes, OpaqueCall
from surgery.capture.places import find_place
from surgery.capture.recording import recorded_attention
from surgery.capture.stand_ins import as_unsharded
from surgery.capture.trace_settings import (
    inference_as_no_grad,
    refused_assignments,
    traceable_config,
    without_checkpointing,
    without_new_attributes,
    without_saving,
)
from surgery.errors import CaptureError, UnsupportedOperationError
from surgery.inputs.signature import SMALLEST, Signature, shortest
from surgery.metadata import Skip, where
from surgery.private import export_patches, refused_specialization, told_eager, without_fake_tensor_cache
from surgery.shapes import Lengths, name_length, residue_of, to_expr

Ranges = Mapping[sympy.Symbol, Any]
_captures = itertools.count()


@dataclass
class Known:
    """What captures of a model find out for others of the same mode.

    `opaque`: the classes that are called whole, and why. `divisors`: of lengths by letter, where a graph serves only
    those that leave one remainder.
    """

    opaque: dict[ModuleClass, str] = field(default_factory=dict)
    divisors: dict[str, int] = field(default_factory=dict)

    def add(self, other: Known) -> None:
        self.opaque |= other.opaque
        self.divisors |= other.divisors


@dataclass
class Capture:
    """A captured graph, and what is needed to call it and to read its outputs.

    `lengths`, `batch`: the symbols of its sizes. `assumptions`: conditions on them under which the trace holds.
    `constants`: tensors that the trace made, by a name that no other capture has. `calls`, `masks`, `opaque_calls`: the
    records, by the numbers that nodes carry. `attempts`: what was tried to get through, for the report.
    `found`: what later captures of the model begin with. `sides`: those taken of the model's branches on data.
    """

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
    found: Known = field(default_factory=Known)
    sides: Sides = ()


def capture(
    model: nn.Module,
    signature: Signature,
    example: tuple[int, ...],
    sides: Sides | None,
    known: Known,
) -> Capture:
    """Trace `model` for `signature` with `torch.export` on an example of these sizes: B sequences of S tokens (and T).

    An example of one is captured for just that size: torch.export specializes ones. Modules that cannot be traced
    become opaque (`opaque.py`), first those `known` to need it from other signatures. `sides` are those to take of
    branches on data (`branches.py`).

    Raises `CaptureError` where the model cannot be exported whole, or only for one sequence length.
    """
    if not signature.letters:
        raise CaptureError(f"expected sequences of two tokens or more, found {signature} of one. Pad it to two.")
    fallbacks = Fallbacks(sides)
    trace = partial(_trace, model, signature, example, fallbacks, known.divisors)
    while True:
        try:
            captured, search = trace_around(model, trace, known.opaque)
        except CaptureError as error:
            if not fallbacks.advance(error):
                raise
        else:
            captured.attempts = (*search.attempts, *describe_branches(captured.graph))
            captured.found.opaque = search.opaque.called_whole
            return captured


def _trace(
    model: nn.Module,
    signature: Signature,
    example: tuple[int, ...],
    fallbacks: Fallbacks,
    divisors: Mapping[str, int],
    opaque: OpaqueModules,
) -> Capture:
    sizes = InputSizes()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # and with gradients, whatever the call is made under
        stack.enter_context(without_new_attributes(model))
        recording = stack.enter_context(recorded_attention(model))
        stack.enter_context(traceable_config(model))
        stack.enter_context(without_checkpointing(model))
        stack.enter_context(without_saving())
        stack.enter_context(inference_as_no_grad())
        stack.enter_context(as_unsharded(model))
        stack.enter_context(refuse_custom_backward())
        stack.enter_context(export_patches())
        stack.enter_context(without_fake_tensor_cache())
        stack.enter_context(torch.backends.opt_einsum.flags(enabled=False))  # it asks for sizes as numbers
        stack.enter_context(refused_specialization(SpecializedError))
        stack.enter_context(told_eager(model) if fallbacks.is_told_eager else nullcontext())
        stack.enter_context(refused_host_randomness(f"the forward of {type(model).__name__}"))
        stack.enter_context(refused_assignments() if opaque.reasons else nullcontext())
        stack.enter_context(opaque.recorded(sizes))
        stack.enter_context(_flat_forward(model, signature, recording, opaque, sizes))
        try:
            program = export_model(model, signature, example, fallbacks, divisors)
            ranges = program.range_constraints
            name_modules_by_index(_nodes(program))
            refuse_gradless_writes(program)
            if any(written_by(node) for node in _nodes(program)):
                program = without_writes(program)
        except CaptureError:
            raise
        except Exception as error:
            stopped = f"{_first_lines(error)}{find_place(error)}"
            raise CaptureError(
                f"torch.export cannot capture {type(model).__name__} for {signature}: {stopped}. "
                "Expected a forward without data-dependent control flow, dynamic in batch and sequence length. "
                "Run the model's code through torch.export.export(strict=False) to see where it stops."
            ) from error
    _refuse_subgraphs(program)
    refuse_nonlinear_operators(program.graph)
    drop_buffer_writes(program, may_be_read=bool(opaque.reasons))
    captured = _to_capture(program, signature, ranges)
    captured.calls, captured.masks = recording.calls, recording.masks
    captured.opaque_calls, captured.sides = tuple(opaque.calls), fallbacks.taken
    return captured


def _conditions(size: torch.SymInt, ranges: Ranges, least: int) -> list[sympy.Basic]:
    """What a program asks of a size; that it is `least` or more, its signature asks already.

    `ranges` are those that torch has found: of `k`, where the size is `4*k`, it says nothing when it narrows one.
    """
    symbol, (divisor, residue), raw = to_expr(size), residue_of(size), size.node.expr
    (root,) = raw.free_symbols
    first, last = ranges[root].lower, ranges[root].upper
    lower, upper = raw.subs(root, first), raw.subs(root, last) if last.is_Integer else None
    modular = [sympy.Eq(sympy.Mod(symbol, divisor), residue)] if divisor > 1 else []
    return [
        *modular,
        *([sympy.Ge(symbol, lower)] if lower > least else []),
        *([sympy.Le(symbol, upper)] if upper is not None else []),
    ]


class SpecializedError(CaptureError):
    """The model's code needs, as a plain number, a size that varies from call to call: to loop over tokens, mostly."""

    def __init__(self) -> None:
        super().__init__("the code needs as a number a size that varies from call to call")


def _first_lines(error: Exception) -> str:
    """What an exporter's message says first: its first two lines, as the second often has the cause."""
    lines = [line.strip(" -.") for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[:2])[:500] if lines else type(error).__name__


@contextmanager
def _flat_forward(
    model: nn.Module, signature: Signature, recording: Recording, opaque: OpaqueModules, sizes: InputSizes
) -> Iterator[None]:
    """Give the model a forward with exactly the signature's tensors as parameters, which reads their sizes.

    Export may run it several times, for other ranges: each time the records begin anew.
    """
    installed = model.__dict__.pop("forward", None)
    original = model.forward

    def forward(**tensors: Tensor) -> Any:
        recording.start(tensors)
        opaque.calls.clear()
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


def _nodes(program: ExportedProgram) -> Iterator[fx.Node]:
    """The nodes of a program's graph, and of the blocks in it."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _to_capture(program: ExportedProgram, signature: Signature, ranges: Ranges) -> Capture:
    """Turn lifted parameters into `get_attr` nodes on the live model, and find the sizes and what is asked of them."""
    graph = program.graph_module.graph
    specs = specs_by_name(program)
    number = next(_captures)
    constants: dict[str, Tensor] = {}
    inputs: list[fx.Node] = []
    for node in list(graph.find_nodes(op="placeholder")):
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
            continue
        if spec.kind is InputKind.CONSTANT_TENSOR:
            assert spec.target is not None
            node.name = f"{node.name}_of_{number}"
            constants[node.name] = program.constants[spec.target]
        _replace_by_attribute(graph, node, _path_of(node, spec))
    names = [tensor.name for tensor in signature.tensors]
    if [node.name for node in inputs] != names:
        raise CaptureError(f"expected the graph's inputs to be {names}, found {[node.name for node in inputs]}")
    sizes = {letter: _size(letter, signature, inputs) for letter in signature.letters}
    lengths = tuple(_length(name, size) for name, size in sizes.values())
    batch_size = _size("b", signature, inputs)[1]
    batch = to_expr(batch_size) if isinstance(batch_size, torch.SymInt) else None
    spec = program.call_spec.out_spec
    assert spec is not None
    graph.owning_module = program.graph_module
    captured = Capture(graph, lengths, batch, spec, constants)
    captured.assumptions += _conditions(batch_size, ranges, SMALLEST) if batch is not None else []
    for letter, (_, size) in sizes.items():
        captured.assumptions += _conditions(size, ranges, shortest(letter, is_alone=len(sizes) == 1))
        if (divisor := residue_of(size)[0]) > 1:
            captured.found.divisors[letter] = divisor
    return captured


def _path_of(node: fx.Node, spec: InputSpec) -> str:
    """Where on the model a lifted value is looked up when the graph runs."""
    assert spec.target is not None
    if spec.kind is InputKind.CUSTOM_OBJ:
        raise UnsupportedOperationError(
            f"the forward uses an object that a graph cannot hold ({spec.target}), such as a torch.Generator. "
            "Expected tensors, and random numbers of torch's default generators. Leave out generator=."
        )
    return f"surgery.constants.{node.name}" if spec.kind is InputKind.CONSTANT_TENSOR else spec.target


def _replace_by_attribute(graph: fx.Graph, node: fx.Node, target: str) -> None:
    body = next(other for other in graph.nodes if other.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(body):
        attribute = graph.create_node("get_attr", target, name=node.name)
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)


def _refuse_subgraphs(program: ExportedProgram) -> None:
    """Refuse operators over graphs or levels of their own, which no rule follows, but for blocks that are inlined."""
    for node in _nodes(program):
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target not in (SET_GRAD, AUTOCAST):
            raise CaptureError(
                f"{where(node)} is an operator over graphs of its own, such as torch.cond, scan and what stands for a "
                "custom op that writes to its inputs. Expected plain operations. Write it without, as a module of "
                "its own, which is then called whole."
            )
        if getattr(node.target, "__module__", "").startswith("torch._functorch"):
            raise CaptureError(
                f"{where(node)} is a part of torch.vmap or of another transform of torch.func, whose values have "
                "dimensions that a graph does not show. Expected plain operations. Write it with a batch dimension, or "
                "as a module of its own, which is then called whole."
            )


def _length(name: str, size: int | torch.SymInt) -> sympy.Symbol:
    length = to_expr(size)
    if not isinstance(length, sympy.Symbol):
        raise CaptureError(
            f"the model fixes the sequence length of {name} to {length} while it is traced. "
            "Expected a forward that works for any length: it branches on, or loops over, the length."
        )
    return length


def _size(letter: str, signature: Signature, inputs: list[fx.Node]) -> tuple[str, Any]:
    """The size called `letter`, and an input that has it: a plain number where it does not vary, None without one."""
    for tensor, node in zip(signature.tensors, inputs, strict=True):
        if letter in tensor.dims:
            size = node.meta["val"].shape[tensor.dims.index(letter)]
            if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols:
                return node.name, int(size.node.expr)
            if isinstance(size, torch.SymInt):
                name_length(size)
            return node.name, size
    return "", None
