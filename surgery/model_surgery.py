"""`model.surgery`: everything the transform knows and does, attached to the model it changed."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from surgery import collectives
from surgery.agreement import check_same_call, whole_length
from surgery.axis import Axis
from surgery.branches import OtherBranchError, Sides
from surgery.capture import Capture, capture
from surgery.checkpointing import checkpointed_layers
from surgery.checks import check_bypass, check_call, how_to_launch
from surgery.engine_checks import check_engine
from surgery.engines import hooked_modules
from surgery.errors import CaptureError, LaunchError
from surgery.examples import DEFAULT_EXAMPLE_BATCH_SIZE, example_lengths
from surgery.images import UnmergedError, merge_images
from surgery.mesh import SequenceMesh
from surgery.metadata import Context
from surgery.options import Options
from surgery.pipeline import run_pipeline
from surgery.printing import GraphPrintout, make_printout
from surgery.private import GroupName
from surgery.program import Program, build_program, relink
from surgery.recipe import SEQUENCE_PARALLEL
from surgery.recorded import DOCUMENT_ENDS
from surgery.report import Report, make_report
from surgery.segments import Cuts
from surgery.sharded_inputs import assemble, gather_slices
from surgery.signature import (
    BoundCall,
    Signature,
    TensorInput,
    autocast_dtype,
    bind_call,
    describe_tensors,
    has_images,
)
from surgery.state import check_state, fingerprint

Inputs = tuple[TensorInput, ...]
Constants = tuple[tuple[str, Any], ...]


class ModelSurgery:
    """The programs of one transformed model, its process groups, and the forward that dispatches between them.

    Attributes:
        mpu: the process groups (`SequenceMesh`), or None where there is no process group or a single rank.
        programs: the rewritten graphs, one for each call signature seen so far, the training step's first.
    """

    def __init__(
        self, model: nn.Module, options: Options, mesh: SequenceMesh | None, forward: Callable[..., Any] | None = None
    ) -> None:
        self.options = options
        self.mpu = mesh
        self.programs: list[Program] = []
        self.constants = types.SimpleNamespace()
        self.is_generating = False
        self.model = model
        self._checked: set[tuple[Any, ...]] = set()
        self._merged: set[tuple[Any, ...]] = set()
        self._unmerged: dict[tuple[Any, ...], str] = {}  # calls whose images go into the graph, and why
        self._original_forward = forward or model.forward
        self._parameters = inspect.signature(self._original_forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelSurgery:
        """For a copy of the model: programs and process groups are shared, the forward is the copy's own."""
        mesh = self.mpu.shared() if self.mpu is not None else None
        twin = ModelSurgery(
            copy.deepcopy(self.model, memo), self.options, mesh, copy.deepcopy(self._original_forward, memo)
        )
        twin.programs, twin.constants = list(self.programs), self.constants
        return twin

    @property
    def axis(self) -> Axis:
        """This rank's view of the sequence-parallel axis; rank 0 where the model is only looked at."""
        return self.mpu.axis if self.mpu is not None else Axis(self.options.sp_size, 0, GroupName("sp"))

    def bypass_reason(self, kwargs: dict[str, Any] | None = None) -> str | None:
        """Why a call would run the original forward on this rank alone, or None if it would be exchanged."""
        if self.options.sp_size == 1:
            return "sp_size is 1"
        if self.is_generating:
            return "generate() decodes on every rank"
        if not self.model.training and self.options.disable_in_eval:
            return "disable_in_eval=True, and the model is in eval mode"
        if not self.model.training and kwargs and (kwargs.get("past_key_values") or kwargs.get("use_cache")):
            return "the call uses a key-value cache"
        return None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The transformed model's forward."""
        if self.bypass_reason(kwargs) is not None:
            check_bypass(kwargs, self.options, is_generating=self.is_generating)
            return self._original_forward(*args, **kwargs)
        call = bind_call(self._parameters, args, kwargs)
        if self.mpu is None:
            raise LaunchError(how_to_launch(self.options.sp_size))
        deal_out = None
        if self.options.inputs == "sharded":
            call, slices = assemble(call, self.axis)
            deal_out = slices.deal_out if not slices.is_even else None
        inputs, constants = describe_tensors(call), sorted_constants(call)
        if not torch.compiler.is_compiling():
            self._check_agreement(call, (inputs, constants))
            if has_images(call):
                call = self._merge(call)
                inputs, constants = describe_tensors(call), sorted_constants(call)
        check_call(call, self.options, self.model.training)
        if torch.compiler.is_compiling():
            return self._find_while_compiling(call, inputs, constants).run(self.model, call.tensors, deal_out)
        return self._run(read_signature(self, inputs, constants, self.model.training), call, deal_out)

    def _run(self, signature: Signature, call: BoundCall, deal_out: Callable[[Tensor, int], Tensor] | None) -> Any:
        """Run the program for a call: another one, where its data take other sides of branches than the first has."""
        sides = None
        while True:
            program = self._find(signature, call.sizes, sides)
            drawn = torch.get_rng_state() if program.sides else None
            try:
                return program.run(self.model, call.tensors, deal_out)
            except OtherBranchError as error:
                sides = (*program.sides[: error.index], error.is_taken)
                assert drawn is not None
                torch.set_rng_state(drawn)  # the other side's seeds are the same: a branch may be on a draw

    def _find(self, signature: Signature, sizes: tuple[int, ...], sides: Sides | None) -> Program:
        program = self.programs[find_program(self, signature, None, sides)]
        return self.programs[find_program(self, signature, sizes, sides)] if program.has_assumptions else program

    def _find_while_compiling(self, call: BoundCall, inputs: Inputs, constants: Constants) -> Program:
        """The same; sizes are asked for only where they matter, as Dynamo makes constants of those that are."""
        program = self.programs[find_while_compiling(self, inputs, constants, self.model.training, None)]
        if program.has_assumptions:
            program = self.programs[find_while_compiling(self, inputs, constants, self.model.training, call.sizes)]
        return program

    def gather(self, value: Tensor, dim: int = 1, *, length: int | None = None) -> Tensor:
        """Make a sharded output, such as logits [B, S/P, V], whole on every rank: [B, S, V]. Differentiable.

        `length` is S. Where it is not given the ranks tell each other how many tokens they hold; a compiled function
        cannot wait for that, and needs it (or, of inputs that a loader has cut, takes all slices to be equal).
        """
        if self.bypass_reason() is not None:
            return value
        dim = dim % value.ndim
        if self.options.inputs == "sharded":
            whole = gather_slices(value, dim, self.axis)
        else:
            length = whole_length(value.shape[dim], self.axis, value.device) if length is None else length
            whole = collectives.gather(value, dim, 1, 1, length, self.axis)
        return whole if self.options.gradients == "mean" else collectives.scale_gradient(whole, 1 / self.axis.size)

    def report(self, program: Program | None = None) -> Report:
        """What was found, what was inserted, what it costs: of the first captured program, or another of `programs`."""
        return make_report(self, program)

    def graph(self, layer: int | None = None, program: Program | None = None) -> GraphPrintout:
        """The rewritten graph to look at, identical layers once, or one `layer` in full detail."""
        return make_printout(self, layer, program)

    def print_graph(self, layer: int | None = None, program: Program | None = None) -> None:
        """Print `graph(...)` to the terminal."""
        Console().print(self.graph(layer, program))

    def prepare(self, *args: Any, **kwargs: Any) -> Program:
        """Capture and rewrite the graph for a call with these arguments, without running it."""
        return self.prepare_call(self.bind(*args, **kwargs))

    def bind(self, *args: Any, **kwargs: Any) -> BoundCall:
        """The call that a graph is given for these arguments: embeddings in the place of ids and images."""
        call = bind_call(self._parameters, args, kwargs)
        return self._merge(call) if has_images(call) else call

    def prepare_call(self, call: BoundCall) -> Program:
        """The program for a bound call, captured now if there is none."""
        signature = read_signature(self, describe_tensors(call), sorted_constants(call), self.model.training)
        return self.programs[find_program(self, signature, call.sizes)]

    def _merge(self, call: BoundCall) -> BoundCall:
        """The call with its images merged, or as it is where they have to go into the graph."""
        key = (describe_tensors(call), sorted_constants(call), self.model.training)
        if key in self._unmerged:
            return call
        try:
            merged = merge_images(self.model, self._original_forward, call, is_checked=key not in self._merged)
        except UnmergedError as error:
            self._unmerged[key] = str(error)
            return call
        self._merged.add(key)
        return merged

    def _check_agreement(self, call: BoundCall, key: tuple[Any, ...]) -> None:
        """Compare the batch between the ranks, as often as `check_inputs` asks for."""
        is_due = self.options.check_inputs == "always" or key not in self._checked
        if self.options.check_inputs == "never" or not is_due:
            return
        assert self.mpu is not None
        check_same_call(call, self.mpu.get_sequence_parallel_group())
        self._checked.add(key)

    def build(self, signature: Signature, example: tuple[int, ...], sides: Sides | None = None) -> Program:
        """Capture the model for `signature`, with an example of these sizes, and run the recipe over its graph."""
        if signature.autocast_dtype is not None:
            raise CaptureError(
                "torch.autocast is on, and the graph would bake its casts in. Expected plain dtypes. "
                "Cast the model instead (model.to(torch.bfloat16)), or leave the autocast block."
            )
        captured = self._capture(signature, example, sides)
        options = self.options
        context = Context(
            self.axis,
            captured.lengths,
            captured.batch,
            sizes={},
            fixed_length=None if options.seq_length_is_variable else options.seq_length,
            on_unknown=options.on_unknown,
            gradients=options.gradients,
            has_document_ends=any(tensor.name == DOCUMENT_ENDS for tensor in signature.tensors),
            calls=captured.calls,
            masks=captured.masks,
            opaque_calls=captured.opaque_calls,
            attempts=captured.attempts,
            assumptions=captured.assumptions,
        )
        run_pipeline(SEQUENCE_PARALLEL, captured.graph, context)
        for name, value in captured.constants.items():
            setattr(self.constants, name, value)
        return build_program(captured, signature, context, find_cuts(self.model))

    def _capture(self, signature: Signature, example: tuple[int, ...], sides: Sides | None) -> Capture:
        try:
            return capture(self.model, signature, example, sides)
        except CaptureError as error:
            reason = self._unmerged.get((signature.tensors, signature.constants, signature.is_training))
            if reason is None:
                raise
            raise CaptureError(
                f"{str(error).rstrip('.')}. Its images cannot be made embeddings in front of the graph either: "
                f"{reason}. Transform the decoder alone, model.get_decoder(), and gather its hidden states."
            ) from error


def sorted_constants(call: BoundCall) -> Constants:
    return tuple((name, call.constants[name]) for name in sorted(call.constants))


def find_cuts(model: nn.Module) -> Cuts:
    """The modules that have to be called: those that carry hooks, and those to be recomputed in the backward."""
    return Cuts(hooked_modules(model), checkpointed_layers(model))


def read_signature(surgery: ModelSurgery, inputs: Inputs, constants: Constants, is_training: bool) -> Signature:
    """The signature of a call of the model as it is now. Raises where a graph would drop something of it."""
    check_state(surgery.model)
    if surgery.mpu is not None:
        check_engine(surgery.model, surgery.options.gradients, surgery.mpu)
    autocast = autocast_dtype(inputs[0].device.type)
    return Signature(inputs, constants, is_training, autocast, fingerprint(surgery.model))


def find_program(
    surgery: ModelSurgery, signature: Signature, sizes: tuple[int, ...] | None, sides: Sides | None = None
) -> int:
    """The index of the program for a call, captured now if there is none.

    `sizes` (B, S, T): one that serves them. `sides`: one that begins with those of the model's branches on data.
    """
    for index, program in enumerate(surgery.programs):
        is_found = program.signature == signature and program.takes(sides)
        if is_found and (sizes is None or program.serves(*sizes)):
            surgery.programs[index] = relink(program, find_cuts(surgery.model))
            return index
    lengths = example_lengths(surgery.options.seq_length)[: len(signature.letters)]
    surgery.programs.append(surgery.build(signature, sizes or (DEFAULT_EXAMPLE_BATCH_SIZE, *lengths), sides))
    return len(surgery.programs) - 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def find_while_compiling(
    surgery: ModelSurgery, inputs: Inputs, constants: Constants, is_training: bool, sizes: tuple[int, ...] | None
) -> int:
    """`find_program` for Dynamo: run once while tracing, in a thread that Dynamo's modes do not reach."""

    def find() -> int:
        return find_program(surgery, read_signature(surgery, inputs, constants, is_training), sizes)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(find).result()
