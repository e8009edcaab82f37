"""Retired words: the package, its tests and its docs use none of tests/retired_words.txt.

python -m tests.test_retired_words PATH...    prints file:line of every one that is found there
"""

from __future__ import annotations

import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

LIST = Path(__file__).with_name("retired_words.txt")
ROOT = Path(__file__).resolve().parents[1]
PLACES = ("carve_kernels", "csrc", "docs", "examples", "tests", "README.md", "Makefile", "setup.py", "pyproject.toml")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".inc", ".md", ".toml", ".cff", ".svg"}
ITSELF = {"retired_words.txt", "test_retired_words.py"}
# Public names that are kept: an option of `batch`, and what `deprecation` registers.
_KEPT = re.compile(r"\"--pictures\", hidden=True|^.*\b(?:deprecation\.\w+|renamed|moved_names|moved_module)\(.*")
_ALIAS = re.compile(r"[\"'][\w.]+[\"']|carve_kernels\.[\w.]+|from carve_kernels import \w+")
_NAME = re.compile(r"[A-Za-z_]\w*")
_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_COMMENT = re.compile(r'//[^\n]*|"(?:[^"\\\n]|\\.)*"|/\*.*?\*/', re.DOTALL)
# What may stand between two words of a phrase: blanks, the marks of a comment, the ends of two strings.
_BETWEEN = r"""(?:[\s#/*"']|\bf(?=["']))+"""


Tables = dict[str, dict[str, str]]


class Found(NamedTuple):
    file: str
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word} -> {self.instead}"


def sections(path: Path = LIST) -> Tables:
    """For each section, what replaces each word."""
    tables: Tables = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = tables.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            word, instead = line.split("\t")
            table[word.lower()] = instead
    return tables


@functools.cache
def pieces(name: str) -> str:
    """A name as its words: `_RoomReader` is `_room_reader_`."""
    return "_" + "_".join(piece.lower() for piece in _PIECE.findall(name)) + "_"


def retired(name: str, table: dict[str, str]) -> list[str]:
    """The retired words that a name is made of."""
    words = pieces(name)
    return [old for old in table if f"_{old}_" in words]


@functools.cache
def phrases(olds: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(olds, key=len, reverse=True)
    return re.compile(
        "|".join(rf"\b{_BETWEEN.join(map(re.escape, old.split()))}\b" for old in longest_first), re.IGNORECASE
    )


def identifiers(text: str, suffix: str) -> Iterator[tuple[int, str]]:
    """The names of a program with their lines, without comments and strings."""
    if suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string
    elif suffix in {".cpp", ".h", ".cu", ".cuh", ".inc"}:
        bare = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
        for number, line in enumerate(bare.splitlines(), start=1):
            yield from ((number, name) for name in _NAME.findall(line))


def readable(path: Path) -> str:
    """The text of a file without the public names that are kept."""
    lines = path.read_text(encoding="utf-8").replace("\\n", "  ").split("\n")
    alias = "deprecation" in path.name
    # The brackets of a kept line stay, so that the file can still be split into tokens.
    return "\n".join(
        _KEPT.sub(lambda kept: re.sub(r"\w+", "x", kept[0]), _ALIAS.sub("", line) if alias else line) for line in lines
    )


def found_in(path: Path, name: str, tables: Tables) -> Iterator[Found]:
    text = readable(path)
    for old in (*retired(path.name, tables["words"]), *retired(path.name, tables["names"])):
        yield Found(name, 0, old, {**tables["words"], **tables["names"]}[old])
    present = set(_NAME.findall(text))
    if any(retired(each, tables["words"]) for each in present):
        for match in _NAME.finditer(text):
            for old in retired(match[0], tables["words"]):
                yield Found(name, text.count("\n", 0, match.start()) + 1, old, tables["words"][old])
    # Splitting every file into tokens would take longer than all the rest.
    if any(retired(each, tables["names"]) for each in present):
        for number, word in identifiers(text, path.suffix):
            for old in retired(word, tables["names"]):
                yield Found(name, number, old, tables["names"][old])
    for match in phrases(tuple(tables["phrases"])).finditer(text):
        words = re.findall(r"\w{2,}", match[0].lower())
        old = next(old for old in tables["phrases"] if re.findall(r"\w{2,}", old) == words)
        yield Found(name, text.count("\n", 0, match.start()) + 1, old, tables["phrases"][old])


def files(places: list[Path]) -> Iterator[Path]:
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            parts = path.relative_to(place).parts
            hidden = any(part.startswith(".") or part in {"__pycache__", "build"} for part in parts)
            text = path.suffix in SUFFIXES or path.name == "Makefile"
            if path.is_file() and text and path.name not in ITSELF and not hidden:
                yield path


def places() -> list[Path]:
    return [*(ROOT / place for place in PLACES), *sorted((ROOT / "benchmarks").glob("*.py")), ROOT / "CITATION.cff"]


def test_no_retired_word_is_left() -> None:
    tables = sections()
    found = [
        str(each) for path in files(places()) for each in found_in(path, path.relative_to(ROOT).as_posix(), tables)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", "_room = RoomReader()\nROOMS = bedroom\n", [(1, "room"), (1, "room"), (2, "rooms")]),
        ("a.py", '"""Shown.""" \nshown = self._shown\n', [(2, "shown"), (2, "shown")]),
        ("a.py", 'f"it is on its "\nf"way"  # says\n# nothing\n', [(1, "on its way"), (2, "says nothing")]),
        ("a.h", "int look;  // a look\n", [(1, "look")]),
        ("a.md", "No house, nothing is shown, `row_maps`.\n", [(1, "house"), (1, "row_maps")]),
        ("a.py", 'option("--pictures", hidden=True)\ndeprecation.renamed(picture="image")\n', []),
        ("test_joint.py", "", [(0, "joint")]),
    ],
)
def test_what_is_found(tmp_path: Path, name: str, text: str, words: list[tuple[int, str]]) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert sorted((each.line, each.word) for each in found_in(path, name, sections())) == sorted(words)


if __name__ == "__main__":
    TABLES = sections()
    FOUND = [
        str(each) for path in files([Path(arg) for arg in sys.argv[1:]]) for each in found_in(path, str(path), TABLES)
    ]
    print("\n".join(FOUND) or "none")
    raise SystemExit(bool(FOUND))
