"""The errors a user can meet. Each says what was expected, what was found, where, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST_LINE = 400


class SurgeryError(Exception):
    """Base class of every error raised on purpose by this package."""


class ConfigurationError(SurgeryError):
    """An option, a model or a mesh that `transform` cannot work with."""


class CaptureError(SurgeryError):
    """The model's forward cannot be captured as one graph, or the graph would drop something the model does."""


class UnsupportedOperationError(SurgeryError):
    """An operation that cannot run on sequence shards, under `on_unknown="refuse"` or because nothing is exact."""


class InputError(SurgeryError):
    """A call whose inputs do not fit: another length than the only one, ranks that disagree, an unknown argument."""


class LaunchError(SurgeryError):
    """A model transformed for several ranks, called without the process group that joins them."""


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, what that was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def in_one_line(error: BaseException) -> str:
    """An error in one line, with its class where it is not a refusal of this package."""
    text = re.sub(r"\s+", " ", str(error))[:LONGEST_LINE]
    return text if isinstance(error, SurgeryError) else f"{type(error).__name__}: {text}"
