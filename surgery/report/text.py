"""Rich output as plain text, and numbers as people read them."""

from __future__ import annotations

import io
import shutil

from rich.console import Console, RenderableType

DEFAULT_WIDTH = 120
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plain_text(renderable: RenderableType, width: int) -> str:
    """What a console of `width` columns would show, without colours or trailing spaces."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, legacy_windows=False).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def terminal_width() -> int:
    """The columns of the terminal, or the default width where there is none."""
    return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns


def bytes_text(size_bytes: float) -> str:
    """`126 KiB`, `1.5 GiB`: three digits and a unit."""
    unit = 0
    while size_bytes >= 1000 and unit < len(UNITS) - 1:
        size_bytes, unit = size_bytes / 1024, unit + 1
    return f"{size_bytes:.3g} {UNITS[unit]}"


def count_text(count: int) -> str:
    """`70.6 B` parameters, `8.03 M`, `992`."""
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def range_text(fewest: int, most: int) -> str:
    """`1-2`, or `2` where all have as many."""
    return f"{fewest}-{most}" if fewest < most else str(most)
