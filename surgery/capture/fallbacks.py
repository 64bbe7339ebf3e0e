"""Fallbacks of a trace: what is tried next where a model's code does not go through as it is.

Eq(u0, 1) depends on data          branches on data are followed, False first      surgery/capture/branches.py
an assertion fails on a side       the last branch is taken the other way
None has no attribute shape        code that asks whether it is traced is told that it is not
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from surgery.capture.branches import FollowedBranches, Sides
from surgery.errors import CaptureError, causes_of
from surgery.private import GuardOnDataDependentSymNode

OWN_FAILURES = (AttributeError, AssertionError, TypeError, ValueError)
"""What a model's code raises where it is led to a place that it never reaches by itself."""


@dataclass
class Fallbacks:
    """How a model is traced next.

    `sides` are those of branches on data (None: no such branch is followed); `taken` those of the last trace;
    `is_told_eager`: the code is told that it is not traced.
    """

    sides: Sides | None = None
    is_told_eager: bool = False
    taken: Sides = ()

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Take the sides of branches, and note them, while the block traces."""
        self.taken = ()
        if self.sides is None:
            yield
            return
        branches = FollowedBranches(self.sides)
        try:
            with branches:
                yield
        finally:
            self.taken = tuple(branches.taken)

    def advance(self, error: CaptureError) -> bool:
        """Choose what to try next, as the trace stopped with `error`; False if none is left."""
        causes = [cause for cause in causes_of(error) if not isinstance(cause, CaptureError)]
        if self.sides is None and any(isinstance(cause, GuardOnDataDependentSymNode) for cause in causes):
            self.sides = ()
            return True
        if not causes or not isinstance(causes[0], OWN_FAILURES):
            return False
        if self.taken and not self.taken[-1]:
            self.sides = (*self.taken[:-1], True)
            return True
        self.is_told_eager, was_told = True, self.is_told_eager
        return not was_told
