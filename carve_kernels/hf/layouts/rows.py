"""The images or videos of each row of a batch, as `layout_of` takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from carve_kernels.checks import describe


def by_row(name: str, values: Any, rows: int, is_one: Callable[[Any], bool]) -> list[list[Any]]:
    """The images or videos, whichever `name` says, of each row: one of them, a list, or a list for each row.

    A list of several is for one row, or has one for each row. `is_one` tells one from a list of them.
    """
    if is_one(values):
        values = [values]
    if not _is_list(values):
        raise TypeError(f"{name}: expected a list of {name} or of lists of {name}, got {describe(values)}")
    nested = [[value] if is_one(value) else value for value in values]
    for row in nested:
        if not _is_list(row):
            raise TypeError(f"{name}: expected a list of {name} or of lists of {name}, one of them is {describe(row)}")
    if rows == 1 and len(nested) > 1:
        nested = [[value for row in nested for value in row]]
    if len(nested) != rows:
        raise ValueError(
            f"{name}: expected a list for each of the {rows} row(s) of the batch, got {len(nested)}; give one list of "
            f"{name} a row, in the order of the prompt"
        )
    return [list(row) for row in nested]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
