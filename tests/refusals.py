"""What is refused, as text: ranks send it home to be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery import SurgeryError


def refusal(action: Callable[[], Any]) -> str:
    """The class and message of the error that `action` raises."""
    try:
        action()
    except SurgeryError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
