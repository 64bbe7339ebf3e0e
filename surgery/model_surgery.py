"""`model.surgery`: everything the transform knows and does, attached to the model it changed."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from surgery import collectives
from surgery.axis import Axis
from surgery.errors import LaunchError
from surgery.inputs.agreement import CallComparison, whole_length
from surgery.inputs.checks import check_bypass, check_call, how_to_launch
from surgery.inputs.images import ImageMerger
from surgery.inputs.sharded_inputs import assemble, gather_slices
from surgery.inputs.signature import BoundCall, bind_call, has_cache
from surgery.mesh import SequenceMesh
from surgery.options import Options
from surgery.programs.program import Program
from surgery.programs.programs import Programs
from surgery.report.printing import GraphPrintout, make_printout
from surgery.report.report import Report, make_report


class ModelSurgery:
    """The programs of one transformed model, its process groups, and the forward that dispatches between them.

    Attributes:
        mpu: the process groups (`SequenceMesh`), or None where there is no process group or a single rank.
    """

    def __init__(
        self, model: nn.Module, options: Options, mesh: SequenceMesh | None, forward: Callable[..., Any] | None = None
    ) -> None:
        self.options = options
        self.mpu = mesh
        self.is_generating = False
        self.model = model
        self._original_forward = forward or model.forward
        self._parameters = inspect.signature(self._original_forward)
        self._images = ImageMerger(model, self._original_forward)
        self._programs = Programs(model, options, mesh, self._images)
        self._comparison = CallComparison(options.check_inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelSurgery:
        """For a copy of the model: programs and process groups are shared, the forward is the copy's own."""
        mesh = self.mpu.shared() if self.mpu is not None else None
        twin = ModelSurgery(
            copy.deepcopy(self.model, memo), self.options, mesh, copy.deepcopy(self._original_forward, memo)
        )
        twin._programs = self._programs.copied_for(twin.model, mesh, twin._images)
        return twin

    def move_to_rank(self, mesh: SequenceMesh) -> None:
        """Take the groups that were missing when the model was transformed: its programs become this rank's, in place.

        For a fork, whose copy of the programs is its own.
        """
        assert self.mpu is None and mesh.axis.size == self.options.sp_size
        assert self.options.seq_length_is_variable, "a fixed length is divided, by the passes, for one rank"
        self.mpu = mesh
        self._programs.move_to_rank(mesh)

    @property
    def programs(self) -> list[Program]:
        """The rewritten graphs, one for each call signature seen so far, the training step's first."""
        return list(self._programs.captured.values())

    @property
    def constants(self) -> types.SimpleNamespace:
        """The tensors that traces made, where the graphs read them."""
        return self._programs.constants

    @property
    def axis(self) -> Axis:
        """This rank's view of the sequence-parallel axis; rank 0 where the model is only looked at."""
        return self._programs.axis

    def bypass_reason(self, kwargs: dict[str, Any] | None = None) -> str | None:
        """Why a call would run the original forward on this rank alone, or None if it would be exchanged."""
        if self.options.sp_size == 1:
            return "sp_size is 1"
        if self.is_generating:
            return "generate() decodes on every rank"
        if not self.model.training and self.options.disable_in_eval:
            return "disable_in_eval=True, and the model is in eval mode"
        if not self.model.training and kwargs and has_cache(kwargs):
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
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            self._comparison.check(call, self.mpu.get_sequence_parallel_group())
            call = self._images.merge(call)
        check_call(call, self.options, self.model.training)
        run = self._programs.run_while_compiling if is_compiling else self._programs.run
        return run(call, deal_out)

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
        call = self.bind(*args, **kwargs)
        check_call(call, self.options, self.model.training)
        return self.prepare_call(call)

    def bind(self, *args: Any, **kwargs: Any) -> BoundCall:
        """The call that a graph is given for these arguments: embeddings in the place of ids and images."""
        return self._images.merge(bind_call(self._parameters, args, kwargs))

    def prepare_call(self, call: BoundCall) -> Program:
        """The program for a bound call, captured now if there is none."""
        return self._programs.prepare(call)
