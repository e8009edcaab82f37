"""Tables on the terminal that stay readable at any width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Cell = str | Text

_WIDE = 200


def screen() -> Console:
    """The terminal; for a file or a pipe, which have no width, one that is wide: rich's 80 would break every cell."""
    console = Console()
    return console if console.is_terminal else Console(width=max(_WIDE, console.width))


def table(title: Cell, columns: Sequence[str], lines: Iterable[Sequence[Cell]]) -> Table:
    """A table whose long cells are wrapped, inside of words where they must be."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        result.add_column(column, overflow="fold")
    for line in lines:
        result.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in line))
    return result


def show(
    console: Console, title: Cell, columns: Sequence[str], lines: Sequence[Sequence[Cell]], spare: Sequence[str]
) -> None:
    """Print a table; where it does not fit on the screen, drop columns of `spare`, the first ones first."""
    for count in range(len(spare) + 1):
        dropped = spare[:count]
        visible = [index for index, column in enumerate(columns) if column not in dropped]
        result = table(
            title, [columns[index] for index in visible], [[line[index] for index in visible] for line in lines]
        )
        if Measurement.get(console, console.options.update(max_width=10_000), result).maximum <= console.width:
            break
    console.print(result)
    if dropped:
        console.print(Text(f"On a wider screen, and in the file: {', '.join(dropped)}."))
