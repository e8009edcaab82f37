"""Text in pictures in any script: each character in the first font of this machine that has it.

Pillow's own font knows English and little more; it goes first, then sans-serif fonts of the system.
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
# Plain fonts with many scripts, the best first; then whatever else there is, the odd styles last.
_PREFERRED = (
    *("dejavusans", "notosans-regular", "notosanscjk-regular", "notosanssc-regular", "pingfang", "hiragino sans gb"),
    *("msyh", "malgun", "meiryo", "wqy-microhei", "wqy-zenhei", "droidsansfallback", "arial unicode", "segoeui"),
)
_STYLED = ("bold", "italic", "oblique", "mono", "serif", "light", "thin", "condensed", "black")
# What draws a box for everything.
_NO_FONT = "lastresort"
_RIGHT_TO_LEFT = ("R", "AL")
_PROBE_SIZE = 20


def legible(text: str) -> str:
    """A text in composed characters, with an escape such as \\u732b for each that no font here has."""
    found, drawn = [], True
    for letter in unicodedata.normalize("NFC", text):
        # A mark on a letter is nothing without it.
        drawn = (drawn or not unicodedata.category(letter).startswith("M")) and _is_drawn(letter)
        found.append(letter if drawn else letter.encode("unicode_escape").decode())
    return "".join(found)


def unreadable(text: str) -> bool:
    """Whether some character of a text is in no font here."""
    return legible(text) != unicodedata.normalize("NFC", text)


def length(text: str, size: int) -> float:
    """How wide a line of text is, in pixels."""
    return sum(font.getlength(run) for run, font in _runs(text, size))


def draw(onto: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int]) -> None:
    """Draw a line of text; `place` is its upper left corner."""
    x: float = place[0]
    baseline = place[1] + _font("", size).getmetrics()[0]
    direction = _direction(text)
    for run, font in _runs(text, size):
        shaped = direction if _shapes(font) else None
        onto.text((x, baseline), run, fill=colour, font=font, anchor="ls", direction=shaped)
        x += font.getlength(run)


def _direction(text: str) -> str:
    """The direction of a line, which is that of its first letter outside of isolates, as Unicode has it."""
    depth = 0
    for kind in map(unicodedata.bidirectional, text):
        depth = max(0, depth + (kind in ("LRI", "RLI", "FSI")) - (kind == "PDI"))
        if depth == 0 and kind in ("L", *_RIGHT_TO_LEFT):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"


def _runs(text: str, size: int) -> list[Run]:
    """The parts of a line from left to right, each in one font, in one for all of it where there is such a font.

    Letters that join, and text from right to left, have to be drawn as one.
    """
    letters = dict.fromkeys(text)
    paths = dict.fromkeys(_path_of(letter) or "" for letter in letters)
    whole = next((path for path in paths if all(_has(path, letter) for letter in letters)), None)
    found: list[tuple[str, str]] = []
    for letter in text:
        last = found[-1][0] if found else whole
        path = last if last is not None and _has(last, letter) else _path_of(letter) or ""
        if found and found[-1][0] == path:
            found[-1] = (path, found[-1][1] + letter)
        else:
            found.append((path, letter))
    runs = [(run if _shapes(_font(path, size)) else _shown(run), _font(path, size)) for path, run in found]
    return runs[::-1] if _direction(text) == "rtl" else runs


def _shapes(font: Any) -> bool:
    return bool(font.layout_engine == ImageFont.Layout.RAQM)


def _shown(text: str) -> str:
    """A text without the signs that steer, for fonts that are not steered and would draw them."""
    return "".join(letter for letter in text if unicodedata.category(letter) != "Cf")


@cache
def _path_of(letter: str) -> str | None:
    """The first font that has a character, "" for Pillow's own, None where there is no such font."""
    # Control characters and halves of a pair are no letters; without shaping others come out in the wrong order.
    if unicodedata.category(letter) in ("Cc", "Cs") or (_needs_shaping(letter) and not features.check("raqm")):
        return None
    return next((path for path in ("", *_paths()) if _has(path, letter)), None)


def _is_drawn(letter: str) -> bool:
    return letter.isspace() or _path_of(letter) is not None


def _needs_shaping(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in _RIGHT_TO_LEFT


@cache
def _has(path: str, letter: str) -> bool:
    """Whether a font draws a character as anything but what it draws for those that it lacks."""
    # Spaces and signs that steer have no picture of their own.
    if unicodedata.category(letter) in ("Zs", "Cf"):
        return True
    try:
        font = _font(path, _PROBE_SIZE)
        own, missing = font.getmask(letter), font.getmask("\uffff")
    # A file that is no font, or one of pictures in a single size.
    except (OSError, ValueError):
        return False
    return own.size != missing.size or bytes(own) != bytes(missing)


@cache
def _font(path: str, size: int) -> Any:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@cache
def _paths() -> tuple[str, ...]:
    """The font files of this machine, those that serve best first."""
    found = [Path(folder, name) for top in _folders() for folder, _, names in os.walk(top) for name in names]
    fonts = {path for path in found if path.suffix.lower() in _SUFFIXES and not path.stem.lower().startswith(_NO_FONT)}
    return tuple(str(path) for path in sorted(fonts, key=_rank))


def _rank(path: Path) -> tuple[int, bool, str]:
    stem = path.stem.lower()
    place = _PREFERRED.index(stem) if stem in _PREFERRED else len(_PREFERRED)
    return place, any(style in stem for style in _STYLED), str(path)


def _folders() -> list[Path]:
    """Where fonts are: the system's, the user's, and those that come with matplotlib where it is installed."""
    home = Path.home()
    if sys.platform == "win32":
        folders = [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")]
        folders += [Path(os.environ.get("LOCALAPPDATA", home), "Microsoft/Windows/Fonts")]
    elif sys.platform == "darwin":
        folders = [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    else:
        shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        own = os.environ.get("XDG_DATA_HOME") or str(home / ".local/share")
        folders = [home / ".fonts", *(Path(folder, "fonts") for folder in (own, *shared.split(":")))]
    package = find_spec("matplotlib")
    places = [] if package is None else package.submodule_search_locations or []
    return [*folders, *(Path(place, "mpl-data/fonts/ttf") for place in places)]
