"""The whole image, then rows of all tiles together without their padding, a newline behind each (LLaVA-NeXT).

An image keeps its shape on the canvas of its tiles, and the model drops rows or columns of padding, whole ones only.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate, groupby, product
from math import sqrt
from typing import Any

import numpy as np
import torch

from carve_kernels.hf.layouts.boxes import part
from carve_kernels.hf.layouts.cells import sides
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.hf.layouts.tiling import function_of
from carve_kernels.types import Box, Size, View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The canvases, the side of a tile, and what the number of tokens depends on."""
    image_processor = processor.image_processor
    found, expected = (
        [list(map(int, canvas)) for canvas in owner.image_grid_pinpoints] for owner in (image_processor, config)
    )
    yield "image_processor.image_grid_pinpoints", found, expected
    for name, length in dict(image_processor.size).items():
        yield f"image_processor.size[{name!r}]", length, config.vision_config.image_size
    for name in ("downsample_rate", "vision_aspect_ratio"):
        if hasattr(config, name) and hasattr(processor, name):
            yield name, getattr(processor, name), getattr(config, name)


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """The whole image and the rows over its tiles; the former alone where a prompt has several images (OneVision)."""
    vision, size = image.config.vision_config, image.size
    pixels, tile = _tiles(image), vision.image_size
    rate = Fraction(getattr(image.config, "downsample_rate", None) or 1)
    side, cell = int(tile // vision.patch_size * rate), int(vision.patch_size / rate)
    grid, cells = (side, side), (cell, cell)
    several = _is_one_of_several(image)
    # Pixels at the right and the bottom that make no whole patch have no token.
    end = side * cell
    box = part(size, (tile, tile), (0, 0), (end, end), (max(size), max(size)) if several else size)
    base = View(tokens.take(side * side), grid, box)
    # A size and a crop that are given to a call are not known.
    check_pixels(image, box, grid, cells, pixels[0])
    if several:
        tokens.take(1)
        return (base,)
    canvas = _canvas(image, pixels)
    rows, columns = canvas[0] // tile, canvas[1] // tile
    last = (rows - 1) * tile, (columns - 1) * tile
    box = _box(image, canvas, last, (last[0] + end, last[1] + end))
    check_pixels(image, box, grid, cells, pixels[rows * columns])
    first, kept = _unpadded(size, (rows * side, columns * side))
    visible = _limited(image.config, kept, side)
    found = tokens.take_rows(*visible)
    # Nothing is kept of an image that is thinner than a patch of its canvas.
    if not found.numel():
        return (base,)
    down, across = (list(_runs(*span, side, cell, tile)) for span in zip(first, kept, visible, strict=True))
    views = [base]
    for (selected, top, bottom), (chosen, left, right) in product(down, across):
        here = found[selected, chosen]
        box = _box(image, canvas, (top, left), (bottom, right))
        views.append(View(here.flatten(), (here.shape[0], here.shape[1]), box, kind="tile"))
    return tuple(views)


def _tiles(image: ProcessedImage) -> torch.Tensor:
    """The pixels of the whole image and of its tiles. Raises ValueError if they are those of another image or model."""
    pixels, tile = image.item("pixel_values", "[images, tiles, 3, H, W]"), image.config.vision_config.image_size
    if tuple(pixels.shape[-2:]) != sides(tile):
        got = f"{pixels.shape[-2]} x {pixels.shape[-1]}"
        raise ValueError(f"inputs: expected tiles of {tile} pixels as in the model's config, got {got}")
    size = sides(image.item("image_sizes").tolist())
    if size != image.size:
        raise ValueError(
            f"images: image {image.number + 1} is {image.size[0]} x {image.size[1]}, that of the inputs is "
            f"{size[0]} x {size[1]}; give the images of the prompts in order"
        )
    return pixels


def _is_one_of_several(image: ProcessedImage) -> bool:
    """Whether the image is one of several of a prompt, by the numbers of images that the processor returned."""
    if not image.has("batch_num_images"):
        return False
    counts = list(map(int, image.entry("batch_num_images")))
    return next(count for count, end in zip(counts, accumulate(counts), strict=True) if image.number < end) > 1


def _canvas(image: ProcessedImage, pixels: torch.Tensor) -> Size:
    """The size of the canvas of an image. Raises ValueError if there are other tiles than those of this canvas."""
    tile, canvases = image.config.vision_config.image_size, list(map(list, image.config.image_grid_pinpoints))
    canvas = sides(function_of(image.image_processor, "select_best_resolution")(image.size, canvases))
    expected = 1 + (canvas[0] // tile) * (canvas[1] // tile)
    if len(pixels) < expected or pixels[expected:, :, :, 0].any():
        raise ValueError(
            f"inputs: pixel_values have other tiles than the {expected} of an image of {image.size[0]} x "
            f"{image.size[1]} by the image_grid_pinpoints of the model's config; give the processor that made the "
            "inputs, with its settings"
        )
    return canvas


def _box(image: ProcessedImage, canvas: Size, start: tuple[float, float], end: tuple[float, float]) -> Box:
    """The box between two corners, in pixels of the canvas with the image in its middle."""
    blank = np.broadcast_to(np.uint8(0), (3, *image.size))
    resized = function_of(image.image_processor, "get_patch_output_size")(blank, canvas, "channels_first")
    top, left = ((full - length) // 2 for full, length in zip(canvas, resized, strict=True))
    return part(image.size, resized, (start[0] - top, start[1] - left), (end[0] - top, end[1] - left))


def _unpadded(size: Size, patches: Size) -> tuple[Size, Size]:
    """The first row and column of the canvas's patches that the model keeps, and how many it keeps."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    kept = unpad_image(torch.arange(patches[0] * patches[1]).view(1, *patches), size)[0]
    first = divmod(int(kept[0, 0]), patches[1]) if kept.numel() else (0, 0)
    return first, (kept.shape[0], kept.shape[1])


def _runs(
    first: int, count: int, visible: int, side: int, cell: int, tile: int
) -> Iterator[tuple[slice, float, float]]:
    """Rows or columns of patches that are kept, resized to `visible`, and the pixels of the canvas that they cover.

    All of them are evenly spaced if tiles have whole patches only, else those of each tile. The model interpolates
    between the two nearest, which lie in two tiles at some of their edges.
    """
    remaining, step, unit = tile - side * cell, Fraction(count, visible), 2 * visible

    def before(number: int) -> int:
        """The pixels without a patch before a row: of so many tiles, and a part of the next at the edge of a tile.

        Times `unit`, in which all numbers are whole.
        """
        row, rest = divmod(unit * first + (2 * number + 1) * count - visible, unit)
        lower, upper = row // side, (row + (rest > 0)) // side
        return remaining * (lower * unit + rest * (upper - lower))

    for whole, numbers in groupby(range(visible), before):
        rows, pixels = list(numbers), Fraction(whole, unit)
        wider = min(pixels % remaining, -pixels % remaining) if remaining else 0
        start, end = (first + number * step for number in (rows[0], rows[-1] + 1))
        yield slice(rows[0], rows[-1] + 1), float(start * cell + pixels - wider), float(end * cell + pixels + wider)


def _limited(config: Any, grid: Size, side: int) -> Size:
    """The rows and columns after the model has resized them to at most about as many patches as `anyres_max_9` says."""
    limit = getattr(config, "vision_aspect_ratio", "")
    ratio = sqrt(grid[0] * grid[1] / (int(limit.removeprefix("anyres_max_")) * side**2)) if limit else 1.0
    return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid
