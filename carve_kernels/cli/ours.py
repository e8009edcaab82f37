"""Which files the commands wrote themselves: these a later run replaces, anybody else's it does not."""

from __future__ import annotations

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
    """What every PNG is saved with, and is known by; and more texts."""
    info = PngInfo()
    for key, text in {"Software": _SOFTWARE, **texts}.items():
        info.add_text(key, text)
    return info


def png_texts(path: Path) -> Mapping[Any, Any] | None:
    """The texts of a PNG that was saved with `png_info`, None of any other file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info if image.info.get("Software") == _SOFTWARE else None
    # A damaged file ends Pillow's decoders in errors of many kinds.
    except Exception:
        return None


def is_json(kind: str) -> IsOurs:
    """Tells whether a file is JSON whose first key says that it is of this kind; the rest of it may be damaged."""
    begins = re.compile(rf'\s*\{{\s*"format": "{re.escape(kind)}/'.encode())

    def check(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return begins.match(file.read(_HEAD)) is not None
        except OSError:
            return False

    return check


def refuse_inputs(outputs: Iterable[Path], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raise ValueError for an output that is an input under any name: a link, or other capitals where these are equal.

    `inputs` are paths by the option that they were given with.
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
            if (facts.st_dev, facts.st_ino) in known:
                option = known[facts.st_dev, facts.st_ino]
                raise ValueError(f"output: {path} is what {option} reads and is not replaced; choose another --output")
