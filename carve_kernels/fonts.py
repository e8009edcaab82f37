"""Text in images in any script: each character in the first font of this machine that has it.

Pillow's font has English and little more; it comes first, then sans-serif fonts of the system.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont, features

Run = tuple[str, Any]

_SUFFIXES = (".ttf", ".otf", ".ttc")
# Plain fonts with many scripts, the best first; all other fonts follow, unusual styles last.
_PREFERRED = (
    *("dejavusans", "notosans-regular", "notosanscjk-regular", "notosanssc-regular", "pingfang", "hiragino sans gb"),
    *("msyh", "malgun", "meiryo", "wqy-microhei", "wqy-zenhei", "droidsansfallback", "arial unicode", "segoeui"),
)
_STYLED = ("bold", "italic", "oblique", "mono", "serif", "light", "thin", "condensed", "black")
# A font that draws a box for every character.
_NO_FONT = "lastresort"
_RIGHT_TO_LEFT = ("R", "AL")
_PROBE_SIZE = 20


def legible(text: str) -> str:
    """A text in composed characters, with an escape such as \\u732b for each that no font has."""
    letters, drawn = [], True
    for letter in unicodedata.normalize("NFC", text):
        # A combining mark needs its letter.
        drawn = drawn or not unicodedata.category(letter).startswith("M")
        drawn = drawn and (letter.isspace() or _path_of(letter) is not None)
        letters.append(letter if drawn else letter.encode("unicode_escape").decode())
    return "".join(letters)


def unreadable(text: str) -> bool:
    """Whether no font has some character of a text."""
    return legible(text) != unicodedata.normalize("NFC", text)


def length(text: str, size: int) -> float:
    """How wide a line of text is, in pixels."""
    return sum(font.getlength(run) for run, font in _runs(text, size))


def draw(
    onto: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, colour: tuple[int, int, int]
) -> None:
    """Draw a line of text; `corner` is its upper left corner."""
    x: float = corner[0]
    baseline = corner[1] + _font("", size).getmetrics()[0]
    direction = _direction(text)
    for run, font in _runs(text, size):
        shaping = direction if _shapes(font) else None
        onto.text((x, baseline), run, fill=colour, font=font, anchor="ls", direction=shaping)
        x += font.getlength(run)


def _direction(text: str) -> str:
    """The direction of a line: by Unicode, that of its first letter outside isolates."""
    depth = 0
    for kind in map(unicodedata.bidirectional, text):
        depth = max(0, depth + (kind in ("LRI", "RLI", "FSI")) - (kind == "PDI"))
        if depth == 0 and kind in ("L", *_RIGHT_TO_LEFT):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"


def _runs(text: str, size: int) -> list[Run]:
    """The runs of a line from left to right, each in one font; a single run where one font has every character.

    Letters that join, and text from right to left, must be drawn in one run.
    """
    letters = dict.fromkeys(text)
    paths = dict.fromkeys(_path_of(letter) or "" for letter in letters)
    whole = next((path for path in paths if all(_has(path, letter) for letter in letters)), None)
    split: list[tuple[str, str]] = []
    for letter in text:
        last = split[-1][0] if split else whole
        path = last if last is not None and _has(last, letter) else _path_of(letter) or ""
        if split and split[-1][0] == path:
            split[-1] = (path, split[-1][1] + letter)
        else:
            split.append((path, letter))
    runs = []
    for path, run in split:
        font = _font(path, size)
        # A font without shaping would draw format characters.
        visible = run if _shapes(font) else "".join(letter for letter in run if unicodedata.category(letter) != "Cf")
        runs.append((visible, font))
    return runs[::-1] if _direction(text) == "rtl" else runs


def _shapes(font: Any) -> bool:
    return bool(font.layout_engine == ImageFont.Layout.RAQM)


@cache
def _path_of(letter: str) -> str | None:
    """The first font that has a character, "" for Pillow's own, None where there is no such font."""
    # Control characters and surrogates are not letters; without shaping, other scripts are in the wrong order.
    needs_shaping = unicodedata.bidirectional(letter) in _RIGHT_TO_LEFT
    if unicodedata.category(letter) in ("Cc", "Cs") or (needs_shaping and not features.check("raqm")):
        return None
    return next((path for path in ("", *_paths()) if _has(path, letter)), None)


@cache
def _has(path: str, letter: str) -> bool:
    """Whether a font draws a character as anything but its glyph for missing characters."""
    # Spaces and format characters have no glyph.
    if unicodedata.category(letter) in ("Zs", "Cf"):
        return True
    try:
        font = _font(path, _PROBE_SIZE)
        glyph, missing = font.getmask(letter), font.getmask("\uffff")
    # A file that is not a font, or a bitmap font of a single size.
    except (OSError, ValueError):
        return False
    return glyph.size != missing.size or bytes(glyph) != bytes(missing)


@cache
def _font(path: str, size: int) -> Any:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@cache
def _paths() -> tuple[str, ...]:
    """The font files of this machine, the best first."""
    files = [Path(folder, name) for top in _folders() for folder, _, names in os.walk(top) for name in names]
    fonts = {path for path in files if path.suffix.lower() in _SUFFIXES and not path.stem.lower().startswith(_NO_FONT)}
    return tuple(str(path) for path in sorted(fonts, key=_rank))


def _rank(path: Path) -> tuple[int, bool, str]:
    stem = path.stem.lower()
    rank = _PREFERRED.index(stem) if stem in _PREFERRED else len(_PREFERRED)
    return rank, any(style in stem for style in _STYLED), str(path)


def _folders() -> list[Path]:
    """The folders of fonts: the system's, the user's, and matplotlib's where it is installed."""
    home = Path.home()
    if sys.platform == "win32":
        folders = [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")]
        folders += [Path(os.environ.get("LOCALAPPDATA", home), "Microsoft/Windows/Fonts")]
    elif sys.platform == "darwin":
        folders = [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    else:
        shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        user = os.environ.get("XDG_DATA_HOME") or str(home / ".local/share")
        folders = [home / ".fonts", *(Path(folder, "fonts") for folder in (user, *shared.split(":")))]
    package = find_spec("matplotlib")
    roots = [] if package is None else package.submodule_search_locations or []
    return [*folders, *(Path(root, "mpl-data/fonts/ttf") for root in roots)]
