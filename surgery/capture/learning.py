"""What an opaque module returns, learnt by running a copy of it at a few sizes.

    x [3, 13, 64] -> y [3, 13, 32]
    x [7, 13, 64] -> y [7, 13, 32]        y is [B, S, 32]
    x [3, 21, 64] -> y [3, 21, 32]
    x [7, 21, 64] -> y [7, 21, 32]

Every dimension must be a whole number times a product of the inputs' sizes. Refused is a module that writes to its
inputs, whose second call gives something else than its first, or whose backward is not linear: each rank runs it on an
addend of the cotangent. On the meta device it runs on fake tensors, and only sizes are learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.capture.host_randomness import refused_host_randomness
from surgery.capture.linearity import is_backward_linear, is_within
from surgery.capture.opaque import OpaqueModules, UnlearnedError
from surgery.capture.opaque_calls import CONSTANTS, Arguments, Number, Results, TensorSpec
from surgery.capture.stand_ins import as_unsharded
from surgery.errors import CaptureError
from surgery.private import FakeTensorMode
from surgery.randomness import draws
from surgery.shapes import Shape

Sizes = dict[sympy.Symbol, int]
COUNTS, LENGTHS = (3, 7), (12, 20)
"""Two sizes of a batch, and of a sequence, which is longer than a convolution's kernel; each symbol has its own."""


class Run(NamedTuple):
    """The leaves that a module returned, their form, and whether it drew random numbers."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    is_random: bool


def learn_all(opaque: OpaqueModules, request: UnlearnedError) -> None:
    """Learn the results of every module of the class that a trace asked for. Raises where one has none to learn."""
    with as_unsharded(opaque.model):
        for path, module in list(opaque.paths(request.module_class)):
            results = learn_results(path, module, request.arguments, request.example)
            opaque.learnt[path, request.arguments] = results


def learn_results(path: str, module: nn.Module, arguments: Arguments, example: Sizes) -> Results:
    """How the results of `module` follow from the sizes of `arguments`. Raises `CaptureError` where they do not.

    Small sizes are tried first; a module that fails at them is tried at multiples of the `example`, as one that
    works in blocks of a fixed length needs.
    """
    small = {symbol: _small_sizes(i, example[symbol]) for i, symbol in enumerate(arguments.symbols)}
    large = {symbol: (example[symbol], 2 * example[symbol]) for symbol in arguments.symbols}
    failures: list[Exception] = []
    for choices in (small, large):
        try:
            return _learn_at(path, module, arguments, list(_trials(choices)))
        except CaptureError:
            raise
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _learn_at(path: str, module: nn.Module, arguments: Arguments, trials: list[Sizes]) -> Results:
    runs = [_run(path, module, arguments, sizes) for sizes in trials]
    if not _is_without_memory(module):
        _check_backward(path, module, arguments, trials[0])
    if any(run.spec != runs[0].spec for run in runs):
        raise CaptureError(f"{path} returns something else for other sizes. Expected results of one form.")
    columns = zip(*(run.leaves for run in runs), strict=True)
    learnt = tuple(_learn(path, column, trials) for column in columns)
    results = Results(learnt, runs[0].spec, any(run.is_random for run in runs))
    if len({tensor.device for tensor in results.tensors}) != 1:
        raise CaptureError(f"{path} returns no tensors, or on several devices. Expected tensors on one.")
    return results


def _small_sizes(index: int, example: int) -> tuple[int, int]:
    """The sizes to try of symbol number `index`: those of a sequence, if it is as long as one in the `example`."""
    first, second = LENGTHS if example > LENGTHS[0] else COUNTS
    return first + index, second + index


def _trials(choices: dict[sympy.Symbol, tuple[int, int]]) -> Iterator[Sizes]:
    """Sizes to run at: the first choices, each symbol changed alone, and all of them changed."""
    first, second = ({symbol: sizes[i] for symbol, sizes in choices.items()} for i in range(2))
    yield first
    for symbol in choices:
        yield {**first, symbol: second[symbol]}
    yield second


def _run(path: str, module: nn.Module, arguments: Arguments, sizes: Sizes) -> Run:
    """Call a copy of `module` twice at `sizes`, on the same inputs and from the same seed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if _is_without_memory(module) else None
    twin = _twin(module, mode)
    devices = {leaf.device for leaf in arguments.leaves if isinstance(leaf, TensorSpec) and leaf.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode if mode is not None else nullcontext())
        torch.manual_seed(0)  # the ranks must come to one answer
        leaves = [_example(leaf, sizes) for leaf in arguments.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, arguments.spec)
        stack.enter_context(refused_host_randomness(path))
        first, second = (_seeded_call(twin, args, kwargs) for _ in range(2))
    if any(leaf._version for leaf in leaves if isinstance(leaf, Tensor)):
        raise CaptureError(f"{path} writes to its inputs. Expected a module that leaves them as they are.")
    if mode is None and not all(map(_is_repeated, first.leaves, second.leaves)):
        raise CaptureError(f"{path} keeps state from call to call. Expected the same result for the same input.")
    return first


def _seeded_call(module: nn.Module, args: Any, kwargs: Any) -> Run:
    torch.manual_seed(0)
    with _Watch() as watch:
        leaves, spec = pytree.tree_flatten(module(*args, **kwargs))
    return Run(leaves, spec, watch.is_random)


def _check_backward(path: str, module: nn.Module, arguments: Arguments, sizes: Sizes) -> None:
    """Refuse a module whose gradients for `u + v` are not those for `u` plus those for `v`, small and large."""
    twin = _twin(module, None)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        leaves = [_example(leaf, sizes) for leaf in arguments.leaves]
    inputs = [leaf.requires_grad_() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    sources = [x for x in (*inputs, *twin.parameters()) if x.requires_grad]
    args, kwargs = pytree.tree_unflatten(leaves, arguments.spec)
    with torch.random.fork_rng({x.device for x in sources if x.device.type == "cuda"}), torch.enable_grad():
        torch.manual_seed(0)
        outputs = [x for x in pytree.tree_leaves(twin(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        if not is_backward_linear(outputs, sources):
            raise CaptureError(f"{path} has a backward that is not linear. Expected gradients that add up over ranks.")


def _is_repeated(first: Any, second: Any) -> bool:
    """Whether the same call gave the same result again, but for the last bits: a state that fades shows in few more."""
    if not isinstance(first, Tensor):
        return bool(first == second)
    if not first.is_floating_point():
        return torch.equal(first, second)
    return is_within(first, second, 8 * torch.finfo(first.dtype).eps)


def _is_without_memory(module: nn.Module) -> bool:
    """Whether there are parameters to look at, but not to compute with: on the meta device, or sharded."""
    tensors = (*module.parameters(), *module.buffers())
    return any(x.is_meta or x.untyped_storage().nbytes() == 0 < x.numel() for x in tensors)


def _twin(module: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """A copy of everything but the parameters: what it counts or keeps while it is tried is lost with it."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        kept = [value for value in vars(part).values() if isinstance(value, Tensor)]
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False), *kept):
            is_shared = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = mode.from_tensor(tensor) if mode else tensor if is_shared else tensor.detach().clone()
    return copy.deepcopy(module, memo)


def _example(leaf: Any, sizes: Sizes) -> Any:
    if isinstance(leaf, Number):
        return _whole(leaf.expr, sizes)
    if not isinstance(leaf, TensorSpec):
        return leaf
    shape = [_whole(size, sizes) for size in leaf.shape]
    if leaf.dtype.is_floating_point:
        return torch.randn(shape, dtype=leaf.dtype, device=leaf.device)
    return torch.ones(shape, dtype=leaf.dtype, device=leaf.device)


def _whole(expr: sympy.Expr, sizes: Sizes) -> int:
    value = expr.subs(sizes)
    if not value.is_Integer:
        raise ValueError(f"{expr} is no whole number at {list(sizes.values())}")
    return int(value)


def _learn(path: str, column: tuple[Any, ...], trials: list[Sizes]) -> Any:
    """One leaf of the results, from what it was in each run."""
    if all(isinstance(value, Tensor) for value in column):
        if len({(x.dtype, x.device, x.ndim) for x in column}) != 1:
            raise CaptureError(f"{path} returns tensors of other types for other sizes. Expected one.")
        dims = zip(*(x.shape for x in column), strict=True)
        shape: Shape = tuple(_fit(path, sizes, trials) for sizes in dims)
        return TensorSpec(shape, column[0].dtype, column[0].device)
    if isinstance(column[0], CONSTANTS) and all(value == column[0] for value in column):
        return column[0]
    raise CaptureError(f"{path} returns a {type(column[0]).__name__}. Expected tensors, None and constants.")


def _fit(path: str, found: tuple[int, ...], trials: list[Sizes]) -> sympy.Expr:
    """The product that a dimension is: `found` holds its size in each run."""
    varying = [symbol for symbol, size in zip(trials[0], found[1:-1], strict=True) if size != found[0]]
    product = sympy.Mul(*varying)
    expr = sympy.Rational(found[0], product.subs(trials[0])) * product
    is_whole = sympy.fraction(expr)[1] == 1
    if not is_whole or any(expr.subs(sizes) != size for sizes, size in zip(trials, found, strict=True)):
        raise CaptureError(
            f"{path} returns a dimension of sizes {list(found)} at {[list(sizes.values()) for sizes in trials]}. "
            "Expected a constant, or a multiple of the batch size or the sequence length."
        )
    return expr


class _Watch(TorchDispatchMode):
    """Notices operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.is_random |= draws(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
