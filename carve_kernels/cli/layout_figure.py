"""A layout as a figure: the image under its numbered tokens, one colour a view, overlapping views side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from carve_kernels import fonts
from carve_kernels.types import Box, View, VisualLayout
from carve_kernels.visualize import Tile, panel

# Sides of a tile of the page in pixels, and of a token's cell that its number needs.
_SMALLEST, _LARGEST, _CELL = 420, 1400, 26
_PAPER, _INK = (241, 242, 245), (20, 22, 28)
_GOLDEN = 0.618034
# How much of the image remains visible under a cell, and where no view is.
_UNDER, _UNSEEN = 0.25, 0.65


class _Scale(NamedTuple):
    """Pixels of the image as pixels of the figure."""

    factor: float
    left: float
    top: float

    def corners(self, box: Box) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = (
            round((edge - (self.top if index % 2 else self.left)) * self.factor) for index, edge in enumerate(box)
        )
        return x0, y0, max(x0 + 1, x1), max(y0 + 1, y1)


def layout_figure(
    image: Image.Image, layout: VisualLayout, numbers: dict[int, int], title: str, caption: str
) -> Image.Image:
    """The page of a layout of one image; `numbers` has the number of each token by its position in the prompt."""
    views = layout.views[0]
    sheets = _sheets(views)
    outline = _around([(0.0, 0.0, float(image.width), float(image.height)), *(view.box for view in views)])
    longest = max(outline[2] - outline[0], outline[3] - outline[1])
    smallest = min(min(_cell(view)) for view in views)
    side = round(min(_LARGEST, max(_SMALLEST, longest * _CELL / smallest)))
    scale = _Scale(side / longest, outline[0], outline[1])
    tiles = [
        Tile(
            _sheet(image, [(number, views[number]) for number in sheet], numbers, outline, scale),
            _title(sheet) if len(views) > 1 else "",
        )
        for sheet in sheets
    ]
    return panel([tiles], title=title, caption=caption, tile=side)


def colour_of(view: int) -> tuple[int, int, int]:
    """The colour of a view: neighbouring numbers have hues far from each other."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + view * _GOLDEN) % 1.0, 0.75, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _title(sheet: Sequence[int]) -> str:
    """Which views a sheet has."""
    if len(sheet) == 1:
        return f"view {sheet[0]}"
    if sheet[-1] - sheet[0] == len(sheet) - 1:
        return f"views {sheet[0]} to {sheet[-1]}"
    return f"views {', '.join(map(str, sheet))}"


def _sheets(views: Sequence[View]) -> list[list[int]]:
    """The numbers of the views that are drawn together: those that do not overlap."""
    sheets: list[list[int]] = []
    for number, view in enumerate(views):
        free = (sheet for sheet in sheets if not any(_overlap(view, views[other]) for other in sheet))
        sheet = next(free, None)
        if sheet is None:
            sheets.append([number])
        else:
            sheet.append(number)
    return sheets


def _overlap(one: View, other: View) -> bool:
    """Whether two views share more than a fifth of a cell."""
    cells = [min(first, second) / 5 for first, second in zip(_cell(one), _cell(other), strict=True)]
    shared = [min(one.box[axis + 2], other.box[axis + 2]) - max(one.box[axis], other.box[axis]) for axis in range(2)]
    return shared[0] > cells[0] and shared[1] > cells[1]


def _cell(view: View) -> tuple[float, float]:
    """Width and height of a token's cell."""
    x0, y0, x1, y1 = view.box
    return (x1 - x0) / view.grid[1], (y1 - y0) / view.grid[0]


def _around(boxes: Sequence[Box]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _sheet(
    image: Image.Image, views: Sequence[tuple[int, View]], numbers: dict[int, int], outline: Box, scale: _Scale
) -> Image.Image:
    x0, y0, x1, y1 = scale.corners(outline)
    figure = Image.new("RGB", (x1 - x0, y1 - y0), _PAPER)
    whole = scale.corners((0.0, 0.0, float(image.width), float(image.height)))
    small = image.convert("RGB").resize((whole[2] - whole[0], whole[3] - whole[1]), Image.Resampling.LANCZOS)
    figure.paste(Image.blend(small, Image.new("RGB", small.size, _INK), _UNSEEN), whole[:2])
    seen = Image.new("L", figure.size)
    for _, view in views:
        ImageDraw.Draw(seen).rectangle(scale.corners(view.box), fill=255)
    light = Image.new("RGB", figure.size, _PAPER)
    light.paste(small, whole[:2])
    figure.paste(light, (0, 0), seen)
    draw = ImageDraw.Draw(figure, "RGBA")
    for number, view in views:
        colour = colour_of(number)
        for token, box in _cells(view):
            left, top, right, bottom = scale.corners(box)
            draw.rectangle((left, top, right, bottom), fill=(*colour, round(255 * _UNDER)), outline=(*colour, 255))
            text = str(numbers[token])
            size = min(22, max(9, round((right - left) * 1.5 / max(3, len(text)))), max(9, round((bottom - top) * 0.6)))
            middle = round((left + right - fonts.length(text, size)) / 2), round((top + bottom - size * 1.2) / 2)
            for step in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                fonts.draw(draw, (middle[0] + step[0], middle[1] + step[1]), text, size, (255, 255, 255))
            fonts.draw(draw, middle, text, size, _INK)
        draw.rectangle(scale.corners(view.box), outline=(*colour, 255), width=3)
    return figure


def _cells(view: View) -> Iterator[tuple[int, Box]]:
    """The position and the box of each token."""
    width, height = _cell(view)
    for index, token in enumerate(view.tokens.tolist()):
        row, column = divmod(index, view.grid[1])
        left, top = view.box[0] + column * width, view.box[1] + row * height
        yield token, (left, top, left + width, top + height)
