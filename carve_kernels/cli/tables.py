"""Tables on the terminal that can be read whatever its width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Cell = str | Text

_WIDE = 200


def screen() -> Console:
    """The terminal; a file or a pipe has no width of its own, and rich's default of 80 would break every cell."""
    console = Console()
    return console if console.is_terminal else Console(width=max(_WIDE, console.width))


def table(title: Cell, columns: Sequence[str], lines: Iterable[Sequence[Cell]]) -> Table:
    """A table whose long cells go on below, letter by letter where they must."""
    found = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        found.add_column(column, overflow="fold")
    for line in lines:
        found.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in line))
    return found


def show(
    console: Console, title: Cell, columns: Sequence[str], lines: Sequence[Sequence[Cell]], spare: Sequence[str]
) -> None:
    """Print a table; where it does not fit on the screen, without columns of `spare`, the first ones first."""
    for count in range(len(spare) + 1):
        left = spare[:count]
        places = [place for place, column in enumerate(columns) if column not in left]
        found = table(
            title, [columns[place] for place in places], [[line[place] for place in places] for line in lines]
        )
        if Measurement.get(console, console.options.update(max_width=10_000), found).maximum <= console.width:
            break
    console.print(found)
    if left:
        console.print(Text(f"On a wider screen, and in the file: {', '.join(left)}."))
