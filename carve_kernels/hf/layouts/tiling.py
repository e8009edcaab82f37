"""What the kinds with tiles share: the grid of tokens of a tile, its part of the image, and the number of tiles."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from carve_kernels.hf.layouts.boxes import shrunk
from carve_kernels.hf.layouts.cells import PATCH, attribute, sides
from carve_kernels.hf.layouts.processed_image import ProcessedImage
from carve_kernels.hf.layouts.seen import AT_ONCE, Resize, check_pixels, check_seen, patches_of
from carve_kernels.types import Box, Size, View

# The place of the view of the whole image, among those of tiles, which are (row, column) from 1.
WHOLE = (0, 0)
Span = tuple[float, float]
# The longest side of cells of tiles that are compared with the image, in pixels.
_CELL = 16


def grid_of(image: ProcessedImage, number: int, tokens: int | None = None) -> tuple[Size, Span]:
    """The grid of a tile of the batch, and how much of the tile's height and width it spans.

    It spans more than the tile if the model pads the patches before it merges them. The option `shapes` names the
    entry with the patches of each tile, if they differ; `merge` the setting of the model's config that says how many
    patches a side become a token, or their possible numbers, from which `tokens` of the prompt select; with the
    entry named by `fine` there are half as many.
    """
    if name := image.options.get("shapes"):
        shapes = image.entry(name, "[tiles, 2]")
        if number >= len(shapes):
            raise ended(image)
        lengths, patch = shapes[number].tolist(), (1, 1)
    else:
        lengths, patch = image.entry("pixel_values").shape[-2:], sides(attribute(image.config, PATCH))
        if lengths[0] != lengths[1]:
            raise ValueError(f"inputs: expected square tiles in pixel_values, got {lengths[0]} x {lengths[1]}")
    for merge in _merges(image):
        rows, columns = (-(-(length // side) // merge) for length, side in zip(lengths, patch, strict=True))
        if tokens in (None, rows * columns):
            span = rows * merge * patch[0] / lengths[0], columns * merge * patch[1] / lengths[1]
            return (rows, columns), span
    raise ValueError(
        f"inputs: the prompt has {tokens} image tokens in a run, a tile needs {rows} x {columns}; the prompt was "
        "probably truncated within the image, or the processor's settings are not the model's"
    )


def tile_view(box: Box, place: Size, tiles: Size, tokens: torch.Tensor, grid: Size, span: Span) -> View:
    """The view of a tile at a place of the rows and columns of tiles that cover a box, or of all of the box."""
    part = shrunk(_tile_box(box, place, tiles), *span)
    return View(tokens, grid, part, kind="base" if place == WHOLE else "tile")


def check_tiles(image: ProcessedImage, box: Box, places: Sequence[Size], tiles: Size, resize: Resize = AT_ONCE) -> None:
    """Raise ValueError if the tiles of an image do not show a box; of tiles with patches of their own, that of WHOLE.

    The order of images of equal numbers of tiles is not seen otherwise.
    """
    pixels = image.entry("pixel_values")
    if (name := image.options.get("shapes")) is None:
        first = image.before + (places[0] == WHOLE and len(places) > 1)
        if pixels.ndim == 5:
            first = int(_real_tiles(image, pixels).flatten().nonzero()[first])
            pixels = pixels.flatten(0, 1)
        own, lengths = pixels[first : first + tiles[0] * tiles[1]].unflatten(0, tiles), pixels.shape[-2:]
        height, width = (max(cell for cell in range(1, _CELL + 1) if side % cell == 0) for side in lengths)
        grid = tiles[0] * lengths[0] // height, tiles[1] * lengths[1] // width
        check_pixels(image, box, grid, (height, width), own, resize)
        return
    index = places.index(WHOLE) if WHOLE in places else 0
    number, part = image.before + index, _tile_box(box, places[index], tiles)
    shapes, cell = image.entry(name), sides(attribute(image.config, PATCH))
    grid = int(shapes[number, 0]), int(shapes[number, 1])
    if pixels.ndim == 4:
        # The patches of all tiles beside each other.
        pixels = pixels[0].unflatten(-1, (-1, cell[1])).movedim(2, 0)[int(shapes[:number].prod(1).sum()) :]
    else:
        pixels = pixels[number]
    check_seen(image, part, grid, cell, patches_of(pixels, grid, (1, 1), raster=True))


def check_count(image: ProcessedImage, tiles: int) -> None:
    """Raise ValueError if the tiles of an image, after those of the images before it, are not those of the inputs."""
    name = image.options.get("shapes", "pixel_values")
    tiles_of = image.entry(name)
    found, needed = len(tiles_of), image.before + tiles
    if tiles_of.ndim == 5:
        found = int(_real_tiles(image, tiles_of).count_nonzero())
    if found < needed or (found > needed and image.number == image.total - 1):
        raise ValueError(
            f"images: {name} has {found} tiles, the prompts of {image.number + 1} image(s) have {needed}; a prompt was "
            "probably truncated, or give every image of the prompts in order"
        )


def _real_tiles(image: ProcessedImage, tiles: torch.Tensor) -> torch.Tensor:
    """Which of the tiles of each row are not those that pad it to the same number as the others, bool [rows, tiles]."""
    mask = image.entries.get("pixel_attention_mask", tiles.new_ones(tiles.shape[:2]))
    return (mask.flatten(2)[..., 0] if mask.ndim > 2 else mask) != 0


def _tile_box(box: Box, place: Size, tiles: Size) -> Box:
    """The part of a box that a tile at a place of its rows and columns of tiles covers; all of it at that of WHOLE."""
    if place == WHOLE:
        return box
    left, top, right, bottom = box
    height, width = (bottom - top) / tiles[0], (right - left) / tiles[1]
    left, top = left + (place[1] - 1) * width, top + (place[0] - 1) * height
    return left, top, left + width, top + height


def pattern_of(image: ProcessedImage, name: str) -> str:
    """A regular expression of the family's options, in which {name} is an attribute of the processor, a text."""
    return re.sub(r"{(\w+)}", lambda found: re.escape(getattr(image.processor, found[1])), image.options[name])


def ended(image: ProcessedImage) -> ValueError:
    """The error if the prompt has no tokens for an image, or not those of all of its tiles."""
    return ValueError(
        f"images: the prompt ends before the last tokens of image {image.number + 1} of {image.total}; the prompt was "
        "probably truncated, or give the images of each row as its own list, in the order of the prompt"
    )


def function_of(image_processor: Any, name: str) -> Any:
    """A function of the module of an image processor."""
    modules = (sys.modules[kind.__module__] for kind in type(image_processor).__mro__)
    found = next((getattr(module, name) for module in modules if hasattr(module, name)), None)
    if found is None:
        raise ValueError(f"processor: the sizes of {type(image_processor).__name__} are not known, it has no {name}")
    return found


def _merges(image: ProcessedImage) -> Sequence[int]:
    merge = image.options.get("merge", (1,))
    if not isinstance(merge, str):
        return tuple(merge)
    factor = attribute(image.config, merge)
    factor = round(1 / factor if factor < 1 else factor)
    return (factor // 2 if image.has(image.options.get("fine", "")) else factor,)
