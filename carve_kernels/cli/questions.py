"""Files of questions, one JSON object a line: what batch and profile read."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from carve_kernels import checks

_KEYS = ("id", "image", "question", "prompt", "answer")
_SHOWN = 5
# What Windows takes for a device, whatever comes after a point.
_DEVICES = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10)))
)
# File systems allow 255 bytes for a name.
_LONGEST = 200


@dataclass(frozen=True)
class Asked:
    """One line: `id` is its line number where none is given, `picture` is relative to the file's own folder."""

    id: str
    line: int
    picture: Path
    text: str
    prompt: str | None
    truth: str | None
    extra: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The id as the name of a file on any system: other ids have other names, none is hidden or leads elsewhere."""
        name = quote(self.id, safe=" ()+,=@[]")
        if name.startswith(".") or name.split(".")[0].rstrip().lower() in _DEVICES:
            name = f"{_escaped(name[0])}{name[1:]}"
        # Windows leaves these out at the end.
        return f"{name[:-1]}{_escaped(name[-1])}" if name.endswith((".", " ")) else name


def read(path: Path) -> list[Asked]:
    """The questions of a file with lines {"image": path, "question": text}.

    Also read are "id" (text or number), "prompt" (the whole text that the model reads) and "answer" (the true one);
    other keys are kept in `extra`. Empty lines are passed over.

    Raises ValueError that names the bad lines by their numbers, the first few of them.
    """
    try:
        # Not splitlines: a JSON text may hold other line ends than this one.
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ValueError(f"input: {path} cannot be read ({error})") from error
    found: list[Asked] = []
    faults: list[str] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode()
            asked = _asked(text, number, path.parent)
            earlier = first.setdefault(asked.id, number)
            if earlier != number:
                raise ValueError(f"id: {asked.id!r} stands on line {earlier} already")
        except (TypeError, ValueError, RecursionError) as error:
            faults.append(f"line {number}: {error}")
        else:
            found.append(asked)
    refuse(path, faults)
    if not found:
        raise ValueError(f"input: {path} holds no questions")
    return found


def refuse(path: Path, faults: Sequence[str]) -> None:
    """Raise ValueError for a file with faults, each of which begins with its line; the first few are told."""
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"input: {path} has bad lines: {'; '.join(faults[:_SHOWN])}{more}")


def _escaped(letter: str) -> str:
    return f"%{ord(letter):02X}"


def _asked(text: str, number: int, folder: Path) -> Asked:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError(f"expected a JSON object, got {checks.describe(values)}")
    known = {key: values[key] for key in _KEYS if values.get(key) is not None}
    given = known.get("id", number)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise TypeError(f"id: expected a text or a number, got {checks.describe(given)}")
    asked = Asked(
        id=checks.text("id", str(given)),
        line=number,
        picture=folder / _path("image", known.get("image")),
        text=_text("question", known.get("question")),
        prompt=_text("prompt", known["prompt"]) if "prompt" in known else None,
        truth=_text("answer", known["answer"]) if "answer" in known else None,
        extra={key: value for key, value in values.items() if key not in _KEYS},
    )
    if len(_text("id", asked.id)) > _LONGEST or len(asked.name) > _LONGEST:
        raise ValueError(f"id: expected at most {_LONGEST} characters in a file name, got {checks.describe(asked.id)}")
    return asked


def _path(name: str, value: Any) -> Path:
    """A path whose letters this system can look up."""
    path = checks.path(name, _text(name, value))
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected a path in {sys.getfilesystemencoding()}, as this system's locale has it, got "
            f"{checks.describe(value)}; set a UTF-8 locale, or PYTHONUTF8=1"
        ) from error
    return path


def _text(name: str, value: Any) -> str:
    """A text that can be written as UTF-8, and be a path."""
    text = checks.text(name, value)
    if "\0" in text:
        raise ValueError(f"{name}: expected characters that can be written, got {checks.describe(text)}")
    return text
