"""Which modules keep a model from being captured: found by where the trace stops, and made opaque one class at a time.

    trace        stops in model.layers.0.mixer, at a loop over the tokens
    MambaMixer   becomes opaque, in all layers; its results are learnt
    trace        goes through, or stops further on

The innermost module around the place is tried first, then those around it, up to a decoder layer. Where a trace says
only at its end that the length is fixed, and not by whom, `narrowing.py` goes from whole layers down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from surgery.capture.candidates import ModuleClass, candidate_paths
from surgery.capture.learning import learn_all
from surgery.capture.narrowing import Narrowing
from surgery.capture.opaque import OpaqueModules, UnlearnedError
from surgery.capture.places import explain, find_modules_around, first_line
from surgery.errors import CaptureError
from surgery.metadata import Skip

T = TypeVar("T")

MOST_ATTEMPTS = 16


@dataclass
class Search:
    """What has been tried: `opaque.reasons` now, `rejected` before, `queue` next."""

    opaque: OpaqueModules
    rejected: dict[ModuleClass, str] = field(default_factory=dict)
    queue: list[ModuleClass] = field(default_factory=list)

    def learn(self, request: UnlearnedError) -> None:
        """Learn the results of the requested class, or give that class up for the next in the queue."""
        try:
            learn_all(self.opaque, request)
        except Exception as error:
            self._reject(request.module_class, error)

    def advance(self, error: CaptureError, around: list[tuple[str, nn.Module]]) -> bool:
        """Choose what to make opaque next, as the trace stopped in the modules `around`; False if nothing is left."""
        allowed = set(candidate_paths(self.opaque.model))
        self.queue = list(dict.fromkeys(type(module) for path, module in around if path in allowed))
        if self.queue and self.queue[0] in self.opaque.reasons:
            self._reject(self.queue[0], error)
        return self._try_next(explain(error))

    def _reject(self, module_class: ModuleClass, error: Exception) -> None:
        self.rejected[module_class] = first_line(error)
        self._try_next(self.opaque.reasons.pop(module_class))

    def _try_next(self, reason: str) -> bool:
        while self.queue:
            candidate = self.queue.pop(0)
            if candidate not in self.rejected and candidate not in self.opaque.reasons:
                self.opaque.reasons[candidate] = reason
                return True
        return False

    @property
    def attempts(self) -> tuple[Skip, ...]:
        """What the report says of the search."""
        called = self.opaque.called_whole.items()
        taken = [Skip(kind.__name__, f"called whole, not traced: {why}") for kind, why in called]
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
            around = find_modules_around(search.opaque.model, error)
            if not around:
                narrowing = Narrowing(search.opaque, trace, search.rejected, explain(error))
                if (found := narrowing.run()) is not None:
                    return found, search
            if not around or not search.advance(error, around):
                break
    assert first is not None
    if not search.attempts:
        raise first
    tried = "; ".join(f"{skip.where} ({skip.reason.rstrip('.')})" for skip in search.attempts)
    raise CaptureError(f"{str(first).rstrip('.')}. Calling modules whole did not help: {tried}.") from first
