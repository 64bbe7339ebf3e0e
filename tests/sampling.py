"""What the default run takes of a long list of cases: a few by name; the others are marked `sweep`.

sampled(ARCHITECTURES, {"llama", "mixtral"})     llama and mixtral always, the rest with `make test-all`
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """The cases as parameters of a test, those that are not `kept` marked."""
    return [case if case in kept else _left_out(case) for case in cases]


def _left_out(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.sweep)
