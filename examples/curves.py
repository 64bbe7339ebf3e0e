"""Two loss curves in the terminal: one as a line of braille dots, the other as marks on top of it.

4.911 ┤●
      │ ⠑●⠤⢄
3.137 ┤     ⠉●⠒●
      └────────────
       1     step 4
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

DOT_COLUMNS, DOT_ROWS = 2, 4  # dots in one braille character
BRAILLE = 0x2800
BRAILLE_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # by column, then row, of the dot
SAMPLES = 16  # per column of dots, so that steep lines have no gaps
ROWS_PER_LABEL = 4
MARGIN = " " * 7
LINE_STYLE, MARK_STYLE, MARK = "cyan", "bold yellow", "●"

Cell = tuple[int, int]


def draw_curves(line: Sequence[float], marks: Sequence[float], names: tuple[str, str], width: int, height: int) -> Text:
    """`line` and `marks`, values at steps 1, 2, ..., on common axes of `width` x `height` characters."""
    low, high = min(*line, *marks), max(*line, *marks)
    last, columns, rows = len(line) - 1, width * DOT_COLUMNS - 1, height * DOT_ROWS - 1

    def dot_at(step: float, value: float) -> Cell:
        return round(step / max(last, 1) * columns), round((high - value) / ((high - low) or 1) * rows)

    steps = [sample / (columns * SAMPLES) * last for sample in range(columns * SAMPLES + 1)]
    dots = {dot_at(step, interpolate(line, step)) for step in steps}
    characters = dict.fromkeys((cell_of(dot_at(*point)) for point in enumerate(marks)), MARK)

    text = Text()
    for row in range(height):
        label = f"{high - row / (height - 1) * (high - low):7.3f} ┤" if row % ROWS_PER_LABEL == 0 else MARGIN + " │"
        text.append(label, "dim")
        for column in range(width):
            character = characters.get((column, row)) or braille(dots, column, row)
            text.append(character, MARK_STYLE if character == MARK else LINE_STYLE)
        text.append("\n")
    text.append(f"{MARGIN} └{'─' * width}\n{MARGIN}  1{f'step {len(line)}':>{width - 1}}\n", "dim")
    text.append(f"{MARGIN}  ⠒⠒ ", LINE_STYLE).append(names[0])
    return text.append(f"   {MARK} ", MARK_STYLE).append(names[1])


def braille(dots: set[Cell], column: int, row: int) -> str:
    """The character whose dots are those of `dots` that fall into one cell."""
    bits = 0
    for x, column_bits in enumerate(BRAILLE_BITS):
        for y, bit in enumerate(column_bits):
            if (column * DOT_COLUMNS + x, row * DOT_ROWS + y) in dots:
                bits |= bit
    return chr(BRAILLE | bits)


def cell_of(dot: Cell) -> Cell:
    """The character cell that holds a dot."""
    return dot[0] // DOT_COLUMNS, dot[1] // DOT_ROWS


def interpolate(values: Sequence[float], step: float) -> float:
    """The value on the straight line between the steps before and after."""
    before = min(int(step), len(values) - 1)
    after = min(before + 1, len(values) - 1)
    return values[before] + (values[after] - values[before]) * (step - before)
