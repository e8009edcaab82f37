"""docs/refusals.md and the code refuse the same: neither has an error that the other lacks."""

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
# Files that load and store, check arguments only, or use models of their own.
ELSEWHERE = {
    "hf/engine/batching.py",
    "hf/engine/cache.py",
    "hf/engine/engine.py",
    "hf/engine/requests.py",
    "hf/loading.py",
    "hf/session/contract.py",
}
# Arguments whose name in the message is a variable.
SPELLED = {
    "hf/engine/video.py": {"fps", "max_frames"},
    "hf/videos.py": {"path", "video"},
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
    """A row of a table; each of its arguments, errors and files is in at least one refusal."""

    arguments: frozenset[str]
    errors: frozenset[str]
    files: frozenset[str]

    def has(self, refusal: Refusal) -> bool:
        return refusal.argument in self.arguments and refusal.error in self.errors and refusal.file in self.files


def first_text(node: ast.expr) -> str:
    """The constant text at the start of a message."""
    if isinstance(node, ast.BinOp):
        return first_text(node.left)
    if isinstance(node, ast.JoinedStr):
        first = node.values[0]
        return first_text(first) if isinstance(first, ast.Constant) else "{}"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def raised(path: Path) -> Iterator[Refusal]:
    file = path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _ERRORS:
            continue
        match = _LEADING.match(first_text(node.args[0])) if node.args else None
        if match is not None:
            yield Refusal(match[1], node.func.id, file)
    for name in SPELLED.get(file, ()):
        yield Refusal(name, "ValueError", file)


def documented() -> Iterator[Row]:
    for line in (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.replace("\\_", "_").split(" | ")]
        if line.startswith("| ") and cells[0] not in ("| refused", "| ---"):
            assert len(cells) == 6, line
            arguments = frozenset(re.findall(r"`(\w+)`", cells[1]))
            yield Row(arguments, frozenset(cells[2].split(", ")), frozenset(cells[3].split(", ")))


CODE = {refusal for path in sorted((PACKAGE / "hf").rglob("*.py")) for refusal in raised(path)}
# Functions that get the name of the argument as a parameter, so no message of theirs has it.
PASSED = {
    *(Refusal(name, "ValueError", "ops/zoom.py") for name in ("image", "images")),
    Refusal("output", "ValueError", "cli/ours.py"),
    Refusal("layers", "RuntimeError", "maps.py"),
    *(Refusal(name, "ValueError", "atomic_write.py") for name in ("output", "path")),
}
# What any function refuses: an argument of another type, or an empty list.
PLAIN = {
    Refusal("inputs", "TypeError", "hf/layouts/__init__.py"),
    Refusal("on_layer", "TypeError", "hf/session/session.py"),
    Refusal("fused", "TypeError", "hf/session/session.py"),
    Refusal("grad", "TypeError", "hf/session/session.py"),
    Refusal("video", "TypeError", "hf/engine/video.py"),
    Refusal("progress", "TypeError", "hf/videos.py"),
    Refusal("videos", "TypeError", "hf/layouts/videos.py"),
    Refusal("probes", "TypeError", "hf/profile/profile.py"),
    Refusal("probes", "ValueError", "hf/profile/profile.py"),
}
ROWS = list(documented())


def test_the_tables_are_read() -> None:
    assert len(ROWS) > 40 and all(row.arguments and row.errors and row.files for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(sorted(row.arguments)))
def test_each_row_is_in_the_code(row: Row) -> None:
    matching = {refusal for refusal in CODE | PASSED if row.has(refusal)}
    assert {refusal.argument for refusal in matching} == row.arguments
    assert {refusal.error for refusal in matching} == row.errors
    assert {refusal.file for refusal in matching} == row.files


def test_each_refusal_of_the_code_is_in_a_row() -> None:
    missing = {refusal for refusal in CODE - PLAIN if not any(row.has(refusal) for row in ROWS)}
    assert {refusal for refusal in missing if refusal.file not in ELSEWHERE} == set()


@pytest.mark.parametrize("file", sorted({*ELSEWHERE, *SPELLED, *(refusal.file for refusal in PASSED | PLAIN)}))
def test_each_named_file_exists(file: str) -> None:
    assert (PACKAGE / file).is_file()
