"""The rewritten graphs of one model: the one that serves a call is found, or captured where there is none yet.

a call  ->  signature: its arguments, the model as it is now  ->  program: captured for it, within its assumptions
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.attention.recorded import DOCUMENT_ENDS
from surgery.axis import Axis
from surgery.capture.branches import OtherBranchError, Sides
from surgery.capture.capture import Capture, Known, capture
from surgery.engine_checks import check_engine
from surgery.engines import hooked_modules
from surgery.errors import CaptureError
from surgery.inputs.examples import DEFAULT_EXAMPLE_BATCH_SIZE, example_lengths
from surgery.inputs.images import ImageMerger
from surgery.inputs.signature import BoundCall, Constants, Signature, TensorInputs, autocast_dtype
from surgery.mesh import SequenceMesh
from surgery.metadata import Context
from surgery.options import Options
from surgery.pipeline import run_pipeline
from surgery.private import GroupName
from surgery.programs.checkpointing import checkpointed_layers
from surgery.programs.program import Program, build_program, move_to_rank, relink
from surgery.programs.segments import Cuts
from surgery.programs.state import check_state, fingerprint
from surgery.recipe import SEQUENCE_PARALLEL
from surgery.threads import in_own_thread

_keys = itertools.count()
DealOut = Callable[[Tensor, int], Tensor]


class Programs:
    """The programs of `model` on its mesh, or on rank 0 of P where the model is only looked at.

    Attributes:
        captured: by number, in the order of the calls they were captured for. A dict, as Dynamo compiles again where a
            list that it has read from grows.
        constants: the tensors that traces made; a graph reads them as `model.surgery.constants.NAME`.
    """

    def __init__(self, model: nn.Module, options: Options, mesh: SequenceMesh | None, images: ImageMerger) -> None:
        self.model = model
        self.options = options
        self.mesh = mesh
        self.images = images
        self.captured: dict[int, Program] = {}
        self._serving: dict[int, Callable[..., bool]] = {}  # of each program, for Dynamo to read before `captured`
        self.constants = types.SimpleNamespace()
        self._known = {is_training: Known() for is_training in (True, False)}
        self._key = f"programs {next(_keys)}"
        self._find_while_compiling = make_constant_finder(self)

    def copied_for(self, model: nn.Module, mesh: SequenceMesh | None, images: ImageMerger) -> Programs:
        """The same programs for a copy of the model, and what their captures found out."""
        twin = Programs(model, self.options, mesh, images)
        twin.captured, twin._serving, twin.constants = dict(self.captured), dict(self._serving), self.constants
        for is_training, known in self._known.items():
            twin._known[is_training].add(known)
        return twin

    def move_to_rank(self, mesh: SequenceMesh) -> None:
        """Make the programs of a model that was only looked at those of this rank, in place."""
        self.mesh = mesh
        for number, program in self.captured.items():
            self.captured[number] = move_to_rank(program, mesh.axis)

    @property
    def axis(self) -> Axis:
        return self.mesh.axis if self.mesh is not None else Axis(self.options.sp_size, 0, GroupName("sp"))

    def run(self, call: BoundCall, deal_out: DealOut | None) -> Any:
        """The model's output for `call`, of the program that takes its data's sides of the model's branches."""
        signature = self.read_signature(*call.kind)
        sides = None
        while True:
            program = self._find_fitting(signature, call.sizes, sides)
            drawn = torch.get_rng_state() if program.sides else None
            try:
                return program.run(self.model, call.tensors, deal_out)
            except OtherBranchError as error:
                sides = (*program.sides[: error.index], error.is_taken)
                assert drawn is not None
                torch.set_rng_state(drawn)  # the other side's seeds are the same: a branch may be on a draw

    def run_while_compiling(self, call: BoundCall, deal_out: DealOut | None) -> Any:
        """The same for Dynamo, which compiles again for sizes that the program does not serve.

        It reads `captured` last: a program that is captured while it traces would not be in what it has read before.
        """
        inputs, constants = call.kind
        find = self._find_while_compiling
        for number in find(self._key, inputs, constants, self.model.training, None):
            if self._serving[number](*call.sizes):
                break
        else:
            (number,) = find(self._key, inputs, constants, self.model.training, call.plain_sizes)
        return self.captured[number].run(self.model, call.tensors, deal_out)

    def prepare(self, call: BoundCall) -> Program:
        """The program for a bound call, captured now if there is none."""
        signature = self.read_signature(*call.kind)
        return self.captured[self.find(signature, call.sizes)]

    def read_signature(self, inputs: TensorInputs, constants: Constants) -> Signature:
        """The signature of a call of the model as it is now. Raises where a graph would drop something of it."""
        check_state(self.model)
        if self.mesh is not None:
            check_engine(self.model, self.options.gradients, self.mesh)
        autocast = autocast_dtype(inputs[0].device.type)
        return Signature(inputs, constants, self.model.training, autocast, fingerprint(self.model))

    def find(self, signature: Signature, sizes: tuple[int, ...] | None, sides: Sides | None = None) -> int:
        """The number of the program for a call, captured now if there is none.

        `sizes` (B, S, T): one that serves them. `sides`: one that begins with those of the model's branches on data.
        """
        for number, program in self.captured.items():
            is_found = program.signature == signature and program.takes(sides)
            if is_found and (sizes is None or program.serves(*sizes)):
                self.captured[number] = relink(program, find_cuts(self.model))
                return number
        lengths = example_lengths(self.options.seq_length)[: len(signature.letters)]
        program = self._build(signature, sizes or (DEFAULT_EXAMPLE_BATCH_SIZE, *lengths), sides)
        number = len(self.captured)
        self.captured[number], self._serving[number] = program, program.serves
        return number

    def find_all(self, signature: Signature) -> tuple[int, ...]:
        """The numbers of the programs for calls of one signature; one is captured if there is none."""
        self.find(signature, None)
        found = tuple(number for number, program in self.captured.items() if program.signature == signature)
        cuts = find_cuts(self.model)
        for number in found:
            self.captured[number] = relink(self.captured[number], cuts)
        return found

    def _find_fitting(self, signature: Signature, sizes: tuple[int, ...], sides: Sides | None) -> Program:
        program = self.captured[self.find(signature, None, sides)]
        return program if program.serves(*sizes) else self.captured[self.find(signature, sizes, sides)]

    def _build(self, signature: Signature, example: tuple[int, ...], sides: Sides | None) -> Program:
        """Capture the model for `signature`, with an example of these sizes, and run the recipe over its graph."""
        if signature.autocast_dtype is not None:
            raise CaptureError(
                "torch.autocast is on, and the graph would bake its casts in. Expected plain dtypes. "
                "Cast the model instead (model.to(torch.bfloat16)), or leave the autocast block."
            )
        captured = self._capture(signature, example, sides)
        context = self._make_context(captured, signature)
        run_pipeline(SEQUENCE_PARALLEL, captured.graph, context)
        for name, value in captured.constants.items():
            setattr(self.constants, name, value)
        program = build_program(captured, signature, context, find_cuts(self.model))
        self._known[signature.is_training].add(captured.found)
        return program

    def _capture(self, signature: Signature, example: tuple[int, ...], sides: Sides | None) -> Capture:
        try:
            return capture(self.model, signature, example, sides, self._known[signature.is_training])
        except CaptureError as error:
            reason = self.images.why_unmerged(signature)
            if reason is None:
                raise
            raise CaptureError(
                f"{str(error).rstrip('.')}. Its images cannot be made embeddings in front of the graph either: "
                f"{reason}. Transform the decoder alone, model.get_decoder(), and gather its hidden states."
            ) from error

    def _make_context(self, captured: Capture, signature: Signature) -> Context:
        options = self.options
        return Context(
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


def find_cuts(model: nn.Module) -> Cuts:
    """The modules that have to be called: those that carry hooks, and those to be recomputed in the backward."""
    return Cuts(hooked_modules(model), checkpointed_layers(model))


def make_constant_finder(programs: Programs) -> Callable[..., tuple[int, ...]]:
    """`find_all`, or `find` where sizes are given, for Dynamo: run once while it traces, out of reach of its modes.

    A closure, as Dynamo of torch 2.11 takes nothing but constants for arguments; all closures are one to Dynamo, which
    tells the programs of a model from those of its copy by their key.
    """

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def find_while_compiling(
        key: str, inputs: TensorInputs, constants: Constants, is_training: bool, sizes: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        """`is_training` is the model's, which Dynamo compiles again for."""

        def find() -> tuple[int, ...]:
            signature = programs.read_signature(inputs, constants)
            return programs.find_all(signature) if sizes is None else (programs.find(signature, sizes),)

        return in_own_thread(find)

    return find_while_compiling
