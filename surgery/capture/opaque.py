"""Opaque modules: those that no trace can follow for any length become one node, called live, on whole values.

    trace       y = mixer(x)    ->   y = surgery::opaque([x], call 0)       the shape of y was learnt by running it
    run time    y = opaque(x)   ->   y = self.model.layers[0].mixer(x)      the module itself, whole on every rank

A scan over the tokens, a branch on their values, a backward written by hand: all of it is exact, as the module is what
runs and what autograd differentiates. It is not shared between the ranks, and its inputs are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture.opaque_calls import Arguments, InputSizes, Number, OpaqueCall, Results, TensorSpec, describe
from surgery.errors import CaptureError, InputError

SCHEMA = (
    "(Tensor[] operands, int call, SymInt[] numbers, SymInt[] sizes, int[] ndims, str[] dtypes, Device device)"
    " -> Tensor[]"
)


@torch.library.custom_op("surgery::opaque", mutates_args=(), schema=SCHEMA)
def opaque(
    operands: Sequence[Tensor],
    call: int,
    numbers: Sequence[int],
    sizes: Sequence[int],
    ndims: Sequence[int],
    dtypes: Sequence[str],
    device: torch.device,
) -> list[Tensor]:
    """Stands for `OpaqueCall` number `call`; `sizes` are those of all results, one after the other.

    `dtypes` are names ("float32"): of a list of dtypes torch 2.11 makes numbers.
    """
    raise AssertionError("surgery::opaque is replaced by the module before a graph runs")


@opaque.register_fake
def _(
    operands: Sequence[Tensor],
    call: int,
    numbers: Sequence[int],
    sizes: Sequence[int],
    ndims: Sequence[int],
    dtypes: Sequence[str],
    device: torch.device,
) -> list[Tensor]:
    shapes = split_sizes(sizes, ndims)
    named = zip(shapes, dtypes, strict=True)
    return [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in named]


def split_sizes(sizes: Sequence[int], ndims: Sequence[int]) -> list[list[int]]:
    """`[2, 8, 64, 2, 8]` with 3 and 2 dimensions is `[[2, 8, 64], [2, 8]]`."""
    remaining = iter(sizes)
    return [[next(remaining) for _ in range(ndim)] for ndim in ndims]


OPAQUE = torch.ops.surgery.opaque.default


class UnlearnedError(CaptureError):
    """The trace met a call whose results are not known yet: they are learnt outside it, and it starts anew."""

    def __init__(self, module_class: type[nn.Module], arguments: Arguments, example: dict[sympy.Expr, int]) -> None:
        super().__init__(f"the results of {module_class.__name__} are not known yet")
        self.module_class = module_class
        self.arguments = arguments
        self.example = example


@dataclass
class OpaqueModules:
    """Which modules of a model a trace must not look into, why, and what is known of their results.

    `reasons` has an entry for each class; `learnt` is keyed by module path and arguments.
    """

    model: nn.Module
    reasons: dict[type[nn.Module], str] = field(default_factory=dict)
    learnt: dict[tuple[str, Arguments], Results] = field(default_factory=dict)
    calls: list[OpaqueCall] = field(default_factory=list)

    def paths(self, module_class: type[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
        """The modules concerned, outermost only: what is inside another is called by it."""
        inside: list[str] = []
        for path, module in self.model.named_modules():
            if type(module) not in self.reasons or any(path.startswith(f"{outer}.") for outer in inside):
                continue
            inside.append(path)
            if module_class is None or type(module) is module_class:
                yield path, module

    @property
    def called_whole(self) -> dict[type[nn.Module], str]:
        """The classes that the last trace called whole, and why."""
        names = {call.module_class for call in self.calls}
        return {kind: why for kind, why in self.reasons.items() if kind.__name__ in names}

    @contextmanager
    def recorded(self, sizes: InputSizes) -> Iterator[None]:
        """While a model is traced, record calls of the modules concerned instead of following them.

        `sizes` are those of the model's inputs, read when its forward begins.
        """
        with ExitStack() as stack:
            for path, module in list(self.paths()):
                stack.enter_context(mock.patch.object(module, "forward", self._recorder(path, module, sizes)))
            yield

    def _recorder(self, path: str, module: nn.Module, sizes: InputSizes) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            values, spec = pytree.tree_flatten((args, kwargs))
            arguments = Arguments(tuple(describe(value, path, sizes) for value in values), spec)
            results = self.learnt.get((path, arguments))
            if results is None:
                raise UnlearnedError(type(module), arguments, sizes.example)
            kind = type(module)
            call = OpaqueCall(path, kind.__name__, self.reasons[kind], arguments, results)
            self.calls.append(call)
            return _emit(call, len(self.calls) - 1, values, sizes)

        return forward


def _emit(call: OpaqueCall, index: int, values: list[Any], known: InputSizes) -> Any:
    """Put `surgery::opaque` into the trace, and give its results the form that the module's have."""
    operands = [value for value in values if isinstance(value, Tensor)]
    numbers = [value for value in values if isinstance(value, torch.SymInt)]
    tensors = call.results.tensors
    sizes = [known.size(expr) for tensor in tensors for expr in tensor.shape]
    made = torch.ops.surgery.opaque(
        operands,
        index,
        numbers,
        sizes,
        [len(tensor.shape) for tensor in tensors],
        [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        tensors[0].device,
    )
    remaining = iter(made)
    leaves = [next(remaining) if isinstance(leaf, TensorSpec) else leaf for leaf in call.results.leaves]
    return pytree.tree_unflatten(leaves, call.results.spec)


def make_runner(call: OpaqueCall) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a rewritten graph that calls the module: `run(module, *operands and numbers, sizes)`.

    Its results must have the learnt `sizes`: where they follow data, or anything else, `InputError` is raised.
    """
    spec, template = call.arguments.spec, call.arguments.leaves
    ndims = [len(tensor.shape) for tensor in call.results.tensors]

    def run(module: nn.Module, *values: Any, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        remaining = iter(values)
        leaves = [next(remaining) if isinstance(leaf, (TensorSpec, Number)) else leaf for leaf in template]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        made = tuple(x for x in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(x, Tensor))
        found, expected = [list(x.shape) for x in made], split_sizes(sizes, ndims)
        if found != expected:
            raise InputError(
                f"{call.path} returned tensors of sizes {found}. Expected {expected}, as in the runs "
                "that they were learnt from. Its sizes depend on more than its inputs' sizes: call restore(model)."
            )
        return made

    run.__name__ = run.__qualname__ = call.module_class
    run.is_random = call.results.is_random  # type: ignore[attr-defined]
    return run
