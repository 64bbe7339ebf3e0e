"""Which modules keep a model from being captured: found by where the trace stops, and made opaque one class at a time.

    trace        stops in model.layers.0.mixer, at a loop over the tokens
    MambaMixer   becomes opaque, in all layers; its results are learnt
    trace        goes through, or stops further on

The innermost module around the place is tried first, then those around it, up to a decoder layer. Where a trace says
only at its end that the length is fixed, and not by whom, the modules of the layers are added in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import nn

from surgery.capture.learning import learn_results
from surgery.capture.opaque import OpaqueModules, UnlearnedError
from surgery.capture.stand_ins import as_unsharded
from surgery.errors import CaptureError, causes_of
from surgery.metadata import Skip
from surgery.regions import is_region

T = TypeVar("T")

MOST_ATTEMPTS = 16
LONGEST_REASON = 160
LIBRARIES = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/")
ModuleClass = type[nn.Module]


@dataclass
class Search:
    """What has been tried: `opaque.reasons` now, `rejected` before, `queue` next."""

    opaque: OpaqueModules
    rejected: dict[ModuleClass, str] = field(default_factory=dict)
    queue: list[ModuleClass] = field(default_factory=list)
    is_exhausted: bool = False

    def learn(self, request: UnlearnedError) -> None:
        """Learn the results of every module of the requested class, or give that class up for the next in the queue."""
        try:
            with as_unsharded(self.opaque.model):
                for path, module in list(self.opaque.paths(request.module_class)):
                    results = learn_results(path, module, request.arguments, request.example)
                    self.opaque.learnt[path, request.arguments] = results
        except Exception as error:
            self._reject(request.module_class, str(error))

    def advance(self, error: CaptureError) -> bool:
        """Choose what to make opaque next, as the trace stopped with `error`; False if there is nothing left."""
        around = find_modules_around(self.opaque.model, error)
        allowed = set(_allowed_paths(self.opaque.model))
        stopped_at = list(dict.fromkeys(type(module) for path, module in around if path in allowed))
        if stopped_at and stopped_at[0] in self.opaque.reasons:
            self._reject(stopped_at[0], str(error))
        if around:
            self.queue = stopped_at
        elif not self.is_exhausted:
            self.is_exhausted = True
            self.queue = list(find_candidates(self.opaque.model))
        return self._try_next(explain(error))

    def _reject(self, module_class: ModuleClass, reason: str) -> None:
        self.rejected[module_class] = reason.splitlines()[0] if reason else "no reason was given"
        self._try_next(self.opaque.reasons.pop(module_class))

    def _try_next(self, reason: str) -> bool:
        while self.queue:
            candidate = self.queue.pop(0)
            if candidate not in self.rejected and candidate not in self.opaque.reasons:
                self.opaque.reasons[candidate] = reason
                return True
        return False

    @property
    def called_whole(self) -> dict[ModuleClass, str]:
        """The classes that the last trace called whole, and why."""
        names = {call.module_class for call in self.opaque.calls}
        return {kind: why for kind, why in self.opaque.reasons.items() if kind.__name__ in names}

    @property
    def attempts(self) -> tuple[Skip, ...]:
        """What the report says of the search."""
        taken = [Skip(kind.__name__, f"called whole, not traced: {why}") for kind, why in self.called_whole.items()]
        tried = [Skip(kind.__name__, f"tried whole: {why}") for kind, why in self.rejected.items()]
        return (*taken, *tried)


def trace_around(
    model: nn.Module, trace: Callable[[OpaqueModules], T], known: Mapping[ModuleClass, str]
) -> tuple[T, Search]:
    """`trace(opaque)`, and how it went, with the `known` opaque modules, or with as few as it needs.

    Raises the first `CaptureError`, extended by what was tried, where no choice of modules helps.
    """
    try:
        return _trace_from(Search(OpaqueModules(model, dict(known))), trace)
    except CaptureError:
        if not known:
            raise
    return _trace_from(Search(OpaqueModules(model)), trace)


def _trace_from(search: Search, trace: Callable[[OpaqueModules], T]) -> tuple[T, Search]:
    """Trace until it goes through, each time with what the last failure suggests."""
    first = None
    for _ in range(MOST_ATTEMPTS):
        try:
            return trace(search.opaque), search
        except UnlearnedError as request:
            search.learn(request)
        except CaptureError as error:
            first = first or error
            if not search.advance(error):
                break
    assert first is not None
    if not search.attempts:
        raise first
    tried = "; ".join(f"{skip.where} ({skip.reason.rstrip('.')})" for skip in search.attempts)
    raise CaptureError(f"{str(first).rstrip('.')}. Calling modules whole did not help: {tried}.") from first


def find_modules_around(model: nn.Module, error: BaseException) -> list[tuple[str, nn.Module]]:
    """The modules of `model` around the place where a trace stopped, with their paths, innermost first."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = [module for cause in causes_of(error) for module in _modules_on(cause.__traceback__)]
    return [(paths[id(module)], module) for module in reversed(found) if id(module) in paths]


def find_candidates(model: nn.Module) -> Iterator[ModuleClass]:
    """The classes of modules that may be made opaque: the parts of the layers first, the layers last."""
    modules = dict(model.named_modules())
    ordered = sorted(_allowed_paths(model), key=lambda path: (-path.count("."), path))
    parts = [path for path in ordered if any(path.startswith(f"{other}.") for other in ordered)]
    return iter(dict.fromkeys(type(modules[path]) for path in [*parts, *ordered]))


def _allowed_paths(model: nn.Module) -> Iterator[str]:
    """Modules of more than torch's own, inside layers or apart from them, and no deeper than mixtures of experts."""
    modules = dict(model.named_modules())
    stacks = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
    regions = [path for path, module in modules.items() if is_region(type(module))]
    for path, module in modules.items():
        is_around_a_stack = any(stack.startswith(f"{path}.") and not _is_nested(stack, stacks) for stack in stacks)
        is_own = not type(module).__module__.startswith("torch.nn.")
        if path and is_own and not is_around_a_stack and not _is_nested(path, regions):
            yield path


def _is_nested(path: str, outer: list[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in outer)


def _modules_on(traceback: TracebackType | None) -> Iterator[nn.Module]:
    while traceback is not None:
        own = traceback.tb_frame.f_locals.get("self")
        if isinstance(own, nn.Module):
            yield own
        traceback = traceback.tb_next


def explain(error: BaseException) -> str:
    """Why a trace stopped, and in which line of the model's code."""
    causes = list(causes_of(error))
    text = str(causes[-1]).strip().splitlines()
    words = text[0].split(". ")[0][:LONGEST_REASON].rstrip(" .") if text else type(causes[-1]).__name__
    return f"{words}{find_place(error)}"


def find_place(error: BaseException) -> str:
    """` (modeling.py:12)`, the line of the model's code where a trace stopped, or "" if unknown."""
    lines = [place for cause in causes_of(error) for place in _places(cause.__traceback__)]
    return f" ({lines[-1]})" if lines else ""


def _places(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        path = traceback.tb_frame.f_code.co_filename
        if not path.startswith(LIBRARIES) and path.endswith(".py"):
            yield f"{path.rsplit('/', 1)[-1]}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
