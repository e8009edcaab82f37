"""docs/refusals.md says what the code refuses: neither has an error that the other does not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from carve_kernels.hf import names
from carve_kernels.hf.session import generate_guard

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "carve_kernels"
# What loads and keeps files, what reads arguments alone, and what is tried on models of its own.
ELSEWHERE = {"loading.py", "checkpoint.py", "memory.py", "batch.py", "engine.py", "contract.py", "looking.py"}
# Names that a message begins with by a variable.
SPELLED = {
    "hf/session/generate_guard.py": set(generate_guard._REFUSED),
    "hf/session/attention_masks.py": {"position_ids", *names._SEGMENTS},
    "hf/session/forward_tracker.py": set(names._CALLBACKS),
}
_LEADING = re.compile(r"([a-z_]+)(\[[^\]]*\])?: ")
_ERRORS = ("ValueError", "TypeError", "RuntimeError")


class Refusal(NamedTuple):
    argument: str
    error: str
    file: str


class Row(NamedTuple):
    """A line of a table; each of its arguments, errors and files is in one refusal at least."""

    arguments: frozenset[str]
    errors: frozenset[str]
    files: frozenset[str]

    def holds(self, refusal: Refusal) -> bool:
        return refusal.argument in self.arguments and refusal.error in self.errors and refusal.file in self.files


def beginning(node: ast.expr) -> str:
    """The text that a message begins with."""
    if isinstance(node, ast.BinOp):
        return beginning(node.left)
    if isinstance(node, ast.JoinedStr):
        first = node.values[0]
        return beginning(first) if isinstance(first, ast.Constant) else "{}"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def raised(path: Path) -> Iterator[Refusal]:
    file = path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _ERRORS:
            continue
        found = _LEADING.match(beginning(node.args[0])) if node.args else None
        if found is not None:
            yield Refusal(found[1], node.func.id, file)
    for name in SPELLED.get(file, ()):
        yield Refusal(name, "ValueError", file)


def written() -> Iterator[Row]:
    for line in (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.replace("\\_", "_").split(" | ")]
        if line.startswith("| ") and cells[0] not in ("| refused", "| ---"):
            assert len(cells) == 6, line
            arguments = frozenset(re.findall(r"`(\w+)`", cells[1]))
            yield Row(arguments, frozenset(cells[2].split(", ")), frozenset(cells[3].split(", ")))


CODE = {refusal for path in sorted((PACKAGE / "hf").rglob("*.py")) for refusal in raised(path)}
# Functions that are told the name of the argument, which no message of theirs spells.
TOLD = {
    *(Refusal(name, "ValueError", "ops/zoom.py") for name in ("image", "images")),
    Refusal("output", "ValueError", "cli/ours.py"),
    *(Refusal(name, "ValueError", "files.py") for name in ("output", "path")),
}
# What any function refuses: an argument of another kind, or none of a list.
PLAIN = {
    Refusal("on_layer", "TypeError", "hf/session/session.py"),
    Refusal("probes", "TypeError", "hf/profile/profile.py"),
    Refusal("probes", "ValueError", "hf/profile/profile.py"),
}
ROWS = list(written())


def test_the_tables_are_read() -> None:
    assert len(ROWS) > 40 and all(row.arguments and row.errors and row.files for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(sorted(row.arguments)))
def test_what_a_row_says_is_in_the_code(row: Row) -> None:
    found = {refusal for refusal in CODE | TOLD if row.holds(refusal)}
    assert {refusal.argument for refusal in found} == row.arguments
    assert {refusal.error for refusal in found} == row.errors
    assert {refusal.file for refusal in found} == row.files


def test_what_the_code_refuses_is_in_a_row() -> None:
    missing = {refusal for refusal in CODE - PLAIN if not any(row.holds(refusal) for row in ROWS)}
    assert {refusal for refusal in missing if Path(refusal.file).name not in ELSEWHERE} == set()
