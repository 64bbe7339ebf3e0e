"""Where a trace stopped: in which modules of the model, in which line of its code, and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from surgery.errors import causes_of

LONGEST_REASON = 160
LIBRARIES = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/")


def find_modules_around(model: nn.Module, error: BaseException) -> list[tuple[str, nn.Module]]:
    """The modules of `model` around the place where a trace stopped, with their paths, innermost first."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = [module for cause in causes_of(error) for module in _modules_on(cause.__traceback__)]
    return [(paths[id(module)], module) for module in reversed(found) if id(module) in paths]


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


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return str(error).splitlines()[0] if str(error) else "no reason was given"


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
