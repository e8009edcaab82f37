"""Tiles of one size with their rows and columns in the prompt, and the whole image before or after them (SmolVLM).

The options are regular expressions of the text in front of the tokens of a view: `whole` for the whole image, `tile`
with the numbers of row and column, or `first`, `column` and `row` for the first tile, the next of a row, and the
first of the next row; `alone` for an image without tiles. `after` matches what follows each view. `last` says that
the whole image ends its tiles, `optional` that it may be left out, `padded` that the tiles cover a padded canvas,
`steps` that the image is resized to the image processor's size, then to its tiles, and only then to that of a tile.
"""

from __future__ import annotations

import re

from carve_kernels.hf.layouts.padded_canvas import canvas_box
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import AT_ONCE
from carve_kernels.hf.layouts.steps import steps_of
from carve_kernels.hf.layouts.tiling import WHOLE, check_count, check_tiles, ended, grid_of, pattern_of, tile_view
from carve_kernels.types import Size, View

_MARKS = ("tile", "first", "column", "row", "whole", "alone")


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """A view of each tile and of the whole image, in the order of the prompt."""
    marks = {name: pattern_of(image, name) for name in _MARKS if name in image.options}
    after = pattern_of(image, "after") if "after" in image.options else None
    grids: dict[tuple[int, int], tuple[Size, tuple[float, float]]] = {}
    parts = []
    places: list[Size] = []
    while run := tokens.run():
        place = _place("".join(tokens.between()), marks, places)
        # A place that the image has already is the next image's.
        if place is None or place in places:
            break
        number = image.before + len(places) if "shapes" in image.options else 0
        if (number, run) not in grids:
            grids[number, run] = grid_of(image, number, run)
        parts.append((tokens.take(run), *grids[number, run]))
        places.append(place)
        if after is not None and not re.match(after, "".join(tokens.between())):
            raise ended(image)
        if place == WHOLE and image.options.get("last"):
            break
    if places == [(1, 1)]:
        places = [WHOLE]
    tiles = _check(image, places)
    box = canvas_box(image, tiles) if image.options.get("padded") else image.box
    whole = box if len(places) == 1 else image.box
    resize = steps_of(image, tiles) if image.options.get("steps") else AT_ONCE
    if resize is not None:
        check_tiles(image, box, places, tiles, resize)
    return tuple(
        tile_view(whole if place == WHOLE else box, place, tiles, *part)
        for place, part in zip(places, parts, strict=True)
    )


def _place(text: str, marks: dict[str, str], places: list[Size]) -> Size | None:
    """The (row, column) of the view behind a text, WHOLE, or None if there is none of the image."""
    row, column = places[-1] if places else WHOLE
    following = {"first": (1, 1), "column": (row, column + 1), "row": (row + 1, 1), "whole": WHOLE, "alone": WHOLE}
    for name, pattern in marks.items():
        found = re.search(f"(?:{pattern})$", text, re.DOTALL)
        if found and not (name == "alone" and places):
            return (int(found[1]), int(found[2])) if name == "tile" else following[name]
    return None


def _check(image: ProcessedImage, places: list[Size]) -> Size:
    """The rows and columns of tiles. Raises ValueError if the prompt lacks some of them, or the whole image."""
    tiles = [place for place in places if place != WHOLE]
    rows, columns = tiles[-1] if tiles else (1, 1)
    whole_at = -1 if image.options.get("last") else 0
    complete = image.options.get("optional") or WHOLE in places[whole_at:][:1]
    expected = [(row + 1, column + 1) for row in range(rows) for column in range(columns)]
    if not places or not complete or (tiles and tiles != expected):
        raise ended(image)
    check_count(image, len(places))
    return rows, columns
