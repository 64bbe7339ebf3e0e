"""What must be called whole where a trace says only at its end that it does not hold, and not because of whom.

    everything whole        {EncoderLayer, DecoderLayer}     the trace holds: something in there is the culprit
    without one             {EncoderLayer}                   it holds still
    without the other       {}                               it does not: the encoder layers have a part in it
    their parts instead     {Attention, Mlp}                 it does not: the layers stay whole

A trace around whole layers is short, so that a model that nothing helps is refused soon.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from surgery.capture.candidates import ModuleClass, outermost_classes, parts_of
from surgery.capture.learning import learn_all
from surgery.capture.opaque import OpaqueModules, UnlearnedError
from surgery.capture.places import find_modules_around, first_line
from surgery.errors import CaptureError, UnsupportedOperationError

T = TypeVar("T")
MOST_REQUESTS = 64


class Narrowing(Generic[T]):
    """The search from all modules down to few and small ones; `rejected` are classes that cannot be called whole."""

    def __init__(
        self, opaque: OpaqueModules, trace: Callable[[OpaqueModules], T], rejected: dict[ModuleClass, str], why: str
    ) -> None:
        self.opaque, self.trace, self.rejected, self.why = opaque, trace, rejected, why
        self.in_vain = [set(opaque.reasons)]
        self.taken_apart: set[ModuleClass] = set()

    def run(self) -> T | None:
        """The trace around as little as possible, which `opaque` is left with; None where nothing helps."""
        found = self._try(outermost_classes(self.opaque.model))
        if found is None:
            return None
        chosen, calls = self.opaque.called_whole, list(self.opaque.calls)
        waiting = deque(chosen)
        while waiting:
            kind = waiting.popleft()
            others = [other for other in chosen if other is not kind]
            for smaller in self._smaller(kind):
                narrower = self._try([*others, *smaller])
                if narrower is not None:
                    found, chosen, calls = narrower, self.opaque.called_whole, list(self.opaque.calls)
                    waiting.extend(part for part in smaller if part in chosen and part not in waiting)
                    break
        self.opaque.reasons, self.opaque.calls = chosen, calls
        return found

    def _smaller(self, kind: ModuleClass) -> Iterator[list[ModuleClass]]:
        """What is tried in the place of a class: nothing, and its parts, if it has any."""
        yield []
        parts = parts_of(self.opaque.model, kind)
        if parts and kind not in self.taken_apart:
            self.taken_apart.add(kind)
            yield parts

    def _try(self, classes: Iterable[ModuleClass]) -> T | None:
        """The trace with these classes called whole; None where it stops, or did with more of them."""
        self.opaque.reasons = dict.fromkeys(self._callable(classes), self.why)
        if any(self.opaque.reasons.keys() <= more for more in self.in_vain):
            return None
        for _ in range(MOST_REQUESTS):
            try:
                return self.trace(self.opaque)
            except UnlearnedError as request:
                try:
                    learn_all(self.opaque, request)
                except Exception as error:
                    self._reject(request.module_class, error)
            except (CaptureError, UnsupportedOperationError) as error:
                around = [type(module) for _, module in find_modules_around(self.opaque.model, error)]
                if not around or around[0] not in self.opaque.reasons:
                    break
                self._reject(around[0], error)
        self.in_vain.append(set(self.opaque.reasons))
        return None

    def _reject(self, module_class: ModuleClass, error: Exception) -> None:
        self.rejected[module_class] = first_line(error)
        self.opaque.reasons = dict.fromkeys(self._callable(self.opaque.reasons), self.why)

    def _callable(self, classes: Iterable[ModuleClass]) -> Iterator[ModuleClass]:
        """These classes, and the parts of those that cannot be called whole."""
        waiting, seen = deque(classes), set[ModuleClass]()
        while waiting:
            kind = waiting.popleft()
            if kind in self.rejected and kind not in seen:
                waiting.extend(parts_of(self.opaque.model, kind))
            elif kind not in seen:
                yield kind
            seen.add(kind)
