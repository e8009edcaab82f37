"""Which files the commands wrote: a later run replaces these and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

IsOurs = Callable[[Path], bool]

_SOFTWARE = "carve_kernels"
_HEAD = 200


def png_info(**texts: str) -> PngInfo:
    """The mark that every PNG is saved with, and more texts."""
    info = PngInfo()
    for key, text in {"Software": _SOFTWARE, **texts}.items():
        info.add_text(key, text)
    return info


def png_texts(path: Path) -> Mapping[Any, Any] | None:
    """The texts of a PNG that was saved with `png_info`; None for any other file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info if image.info.get("Software") == _SOFTWARE else None
    # Pillow's decoders raise many kinds of errors for a damaged file.
    except Exception:
        return None


def is_json(kind: str) -> IsOurs:
    """A test whether a file is JSON whose first key names this kind; the rest of it may be damaged."""
    begins = re.compile(rf'\s*\{{\s*"format": "{re.escape(kind)}/'.encode())

    def check(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return begins.match(file.read(_HEAD)) is not None
        except OSError:
            return False

    return check


def write_json(path: Path, kind: str, values: Mapping[str, Any]) -> None:
    """Write a file that `is_json` of this kind accepts."""
    text = json.dumps({"format": f"{kind}/1", **values}, indent=2, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def refuse_inputs(outputs: Iterable[Path], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raise ValueError for an output that is also an input, by any name: a link, or other capitals on some systems.

    `inputs` are paths by their option.
    """
    known = {}
    for option, paths in inputs.items():
        for path in paths:
            with suppress(OSError):
                facts = path.stat()
                known[facts.st_dev, facts.st_ino] = option
    for path in outputs:
        with suppress(OSError):
            facts = path.stat()
            source = known.get((facts.st_dev, facts.st_ino))
            if source is not None:
                raise ValueError(f"output: {path} is an input ({source}) and is not replaced; choose another --output")
