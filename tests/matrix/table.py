"""The table of the rows in the docs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date

from tests.matrix.checks import Outcome
from tests.matrix.rows import ROWS, Row

HEAD = (
    "row",
    "Python",
    "torch",
    "transformers",
    "Triton",
    "zoo",
    "sessions and engine",
    "Triton interpreted",
    "Triton compiled",
    "seconds",
    "run on",
    "result",
)
NOT_RUN = "not run yet"
BEGIN, END = "<!-- written by make matrix -->", "<!-- end -->"


def line(row: Row, outcome: Outcome, day: date) -> str:
    """A row of the table."""
    installed = [outcome.versions.get(name, "-") for name in ("python", "torch", "transformers", "triton")]
    counted = [outcome.cells.get(name, "-") for name in ("zoo", "sessions", "interpreted", "compiled")]
    cells = [row.name, *installed, *counted, f"{outcome.seconds:.0f}", day.isoformat(), outcome.result]
    return _cells(cells)


def table(lines: Mapping[str, str]) -> list[str]:
    """The whole table; `lines` maps names of rows to lines."""
    missing = {row.name: _cells([row.name, row.python, *["-"] * (len(HEAD) - 3), NOT_RUN]) for row in ROWS}
    rule = _cells(["---"] * len(HEAD))
    return [_cells(list(HEAD)), rule, *(lines.get(row.name, missing[row.name]) for row in ROWS)]


def lines_of(page: str) -> dict[str, str]:
    """The lines of the rows on a page."""
    named = ((re.match(r"\| (\S+) \|", each), each) for each in page.splitlines())
    return {match[1]: each for match, each in named if match and match[1] in {row.name for row in ROWS}}


def replaced(page: str, lines: Mapping[str, str], machine: str) -> str:
    """The page with these rows replaced."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"page: expected the marks {BEGIN} and {END} around its table")
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    written = "\n".join(table(lines_of(page) | dict(lines)))
    return f"{before}{BEGIN}\n{written}\n\nThe newest rows: {machine}.\n{END}{after}"


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
