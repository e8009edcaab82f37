"""Files of questions, one JSON object a line: the input of batch and profile."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from carve_kernels import checks
from carve_kernels.cli.output import first_few

_KEYS = ("id", "image", "video", "question", "prompt", "answer")
# Windows takes these for devices, with or without a suffix.
_DEVICES = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10)))
)
# File systems allow 255 bytes for a name.
_LONGEST = 200


@dataclass(frozen=True)
class QuestionLine:
    """One line: `id` is its line number if it has none; paths are relative to the folder of the file.

    `image` is the image, the first of several, whose `others` follow, or the video if it `is_video`.
    """

    id: str
    line: int
    image: Path
    text: str
    prompt: str | None
    truth: str | None
    extra: Mapping[str, Any]
    others: tuple[Path, ...] = ()
    is_video: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """All images, or the video."""
        return (self.image, *self.others)

    @property
    def name(self) -> str:
        """The id as a file name for any system: unique, not hidden, and in one folder."""
        name = quote(self.id, safe=" ()+,=@[]")
        if name.startswith(".") or name.split(".")[0].rstrip().lower() in _DEVICES:
            name = f"{_escaped(name[0])}{name[1:]}"
        # Windows drops these at the end of a name.
        return f"{name[:-1]}{_escaped(name[-1])}" if name.endswith((".", " ")) else name


def read(path: Path) -> list[QuestionLine]:
    """The questions of a file with lines {"image": path, "question": text}: a list of paths, or "video", instead.

    Optional keys are "id" (text or number), "prompt" (the whole text that the model reads) and "answer" (the true
    one); other keys are stored in `extra`. Empty lines are skipped.

    Raises ValueError with the numbers of the first few bad lines.
    """
    try:
        # Not splitlines, which also splits at line ends that are part of a JSON text.
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ValueError(f"input: {path} cannot be read ({error})") from error
    questions: list[QuestionLine] = []
    faults: list[str] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(line.decode(), number, path.parent)
            earlier = first.setdefault(question.id, number)
            if earlier != number:
                raise ValueError(f"id: {question.id!r} is also the id of line {earlier}")
        except (TypeError, ValueError, RecursionError) as error:
            faults.append(f"line {number}: {error}")
        else:
            questions.append(question)
    refuse(path, faults)
    if not questions:
        raise ValueError(f"input: {path} has no questions")
    return questions


def refuse(path: Path, faults: Sequence[str]) -> None:
    """Raise ValueError with the first few faults of a file, each of which begins with its line."""
    if faults:
        raise ValueError(f"input: {path} has bad lines: {first_few(faults)}")


def _escaped(letter: str) -> str:
    return f"%{ord(letter):02X}"


def _question(text: str, number: int, folder: Path) -> QuestionLine:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise TypeError(f"expected a JSON object, got {checks.describe(values)}")
    fields = {key: values[key] for key in _KEYS if values.get(key) is not None}
    missing = [] if "video" in fields or "image" in fields else ["image: missing"]
    missing += [] if "question" in fields else ["question: missing"]
    if missing:
        raise ValueError("; ".join(missing))
    if "video" in fields and "image" in fields:
        raise ValueError("image, video: expected one of them, got both")
    kind = "video" if "video" in fields else "image"
    paths = _paths(kind, fields[kind], folder)
    id = fields.get("id", number)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise TypeError(f"id: expected a text or a number, got {checks.describe(id)}")
    question = QuestionLine(
        id=checks.text("id", str(id)),
        line=number,
        image=paths[0],
        text=_text("question", fields["question"]),
        prompt=_text("prompt", fields["prompt"]) if "prompt" in fields else None,
        truth=_text("answer", fields["answer"]) if "answer" in fields else None,
        extra={key: value for key, value in values.items() if key not in _KEYS},
        others=paths[1:],
        is_video=kind == "video",
    )
    if len(_text("id", question.id)) > _LONGEST or len(question.name) > _LONGEST:
        raise ValueError(
            f"id: expected at most {_LONGEST} characters in a file name, got {checks.describe(question.id)}"
        )
    return question


def _paths(name: str, value: Any, folder: Path) -> tuple[Path, ...]:
    """The path of an image or a video, or those of several images."""
    if name == "video" or not isinstance(value, list):
        return (folder / checks.path(name, _text(name, value)),)
    if not value:
        raise ValueError("image: expected at least one path, got an empty list")
    return tuple(
        folder / checks.path(f"image[{index}]", _text(f"image[{index}]", each)) for index, each in enumerate(value)
    )


def _text(name: str, value: Any) -> str:
    """A text that can be written as UTF-8 and used in a path."""
    text = checks.text(name, value)
    if "\0" in text:
        raise ValueError(f"{name}: expected characters that can be written, got {checks.describe(text)}")
    return text
