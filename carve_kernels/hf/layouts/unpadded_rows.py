"""The whole image, then rows of all tiles together without their padding, a newline behind each (LLaVA-NeXT).

An image keeps its shape on the canvas of its tiles, and the model drops rows or columns of padding, whole ones only.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import groupby, product
from math import ceil, floor, sqrt
from typing import Any

import numpy as np
import torch

from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.hf.layouts.tiling import function_of, size_of
from carve_kernels.types import Box, Size, View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The canvases, the side of a tile, and what the number of tokens depends on."""
    image_processor = processor.image_processor
    canvases = [list(map(int, canvas)) for canvas in config.image_grid_pinpoints]
    found = image_processor.image_grid_pinpoints
    yield "image_processor.image_grid_pinpoints", [list(map(int, canvas)) for canvas in found], canvases
    side, size = config.vision_config.image_size, dict(image_processor.size)
    for name, length in size.items():
        yield f"image_processor.size[{name!r}]", length, side
    for name in ("downsample_rate", "vision_aspect_ratio"):
        if hasattr(config, name) and hasattr(processor, name):
            yield name, getattr(processor, name), getattr(config, name)


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """The whole image and the rows over its tiles; the former alone where a prompt has several images (OneVision)."""
    vision = image.config.vision_config
    pixels = image.item("pixel_values", "[images, tiles, 3, H, W]")
    if tuple(pixels.shape[-2:]) != size_of(vision.image_size):
        got = f"{pixels.shape[-2]} x {pixels.shape[-1]}"
        raise ValueError(f"inputs: expected tiles of {vision.image_size} pixels as in the model's config, got {got}")
    size = tuple(int(side) for side in image.item("image_sizes"))
    if size != image.size:
        raise ValueError(
            f"images: image {image.number + 1} is {image.size[0]} x {image.size[1]}, that of the inputs is "
            f"{size[0]} x {size[1]}; give the images of the prompts in order"
        )
    rate = Fraction(getattr(image.config, "downsample_rate", None) or 1)
    side, cell = int(vision.image_size // vision.patch_size * rate), int(vision.patch_size / rate)
    grid, cells = (side, side), (cell, cell)
    several = _one_of_several(image)
    # Pixels at the right and the bottom that make no whole patch have no token.
    part = side * cell / vision.image_size
    base = View(tokens.take(side * side), grid, _shrunk(_square(image.size) if several else image.box, part))
    # A size and a crop that are given to a call are not known.
    check_pixels(image, base.box, grid, cells, pixels[0])
    if several:
        tokens.take(1)
        return (base,)
    resolution = function_of(image.image_processor, "select_best_resolution")
    canvas = size_of(resolution(size, [list(each) for each in image.config.image_grid_pinpoints]))
    tiles = canvas[0] // vision.image_size, canvas[1] // vision.image_size
    expected = 1 + tiles[0] * tiles[1]
    if len(pixels) < expected or pixels[expected:, :, :, 0].any():
        raise ValueError(
            f"inputs: pixel_values have other tiles than the {expected} of an image of {size[0]} x {size[1]} by the "
            "image_grid_pinpoints of the model's config; give the processor that made the inputs, with its settings"
        )
    whole = _canvas_box(image, canvas)
    corner = (tiles[0] - 1) * vision.image_size, (tiles[1] - 1) * vision.image_size
    last = _box(whole, canvas, corner, (corner[0] + side * cell, corner[1] + side * cell))
    check_pixels(image, last, grid, cells, pixels[expected - 1])
    first, kept = _unpadded(image.size, (tiles[0] * side, tiles[1] * side))
    visible = _limited(image.config, kept, side)
    rows = tokens.take(visible[0] * (visible[1] + 1)).view(visible[0], visible[1] + 1)[:, :-1]
    # Nothing is kept of an image that is thinner than a patch of its canvas.
    if not rows.numel():
        return (base,)
    down, across = (
        list(_runs(*span, side, cell, vision.image_size)) for span in zip(first, kept, visible, strict=True)
    )
    views = [base]
    for (selected, top, bottom), (columns, left, right) in product(down, across):
        here = rows[selected, columns]
        box = _box(whole, canvas, (top, left), (bottom, right))
        views.append(View(here.flatten(), (here.shape[0], here.shape[1]), box, kind="tile"))
    return tuple(views)


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
    remaining, step = tile - side * cell, Fraction(count, visible)

    def before(number: int) -> Fraction:
        """The pixels without a patch before a row: of so many tiles, and a part of the next at the edge of a tile."""
        at = first + (number + Fraction(1, 2)) * step - Fraction(1, 2)
        lower, upper = floor(at) // side, ceil(at) // side
        return remaining * (lower + at % 1 * (upper - lower))

    for pixels, numbers in groupby(range(visible), before):
        rows = list(numbers)
        wider = min(pixels % remaining, -pixels % remaining) if remaining else 0
        start, end = (first + number * step for number in (rows[0], rows[-1] + 1))
        yield slice(rows[0], rows[-1] + 1), float(start * cell + pixels - wider), float(end * cell + pixels + wider)


def _canvas_box(image: ProcessedImage, canvas: Size) -> Box:
    """The canvas of all tiles, with the image in its middle."""
    blank = np.broadcast_to(np.uint8(0), (3, *image.size))
    resized = function_of(image.image_processor, "get_patch_output_size")(blank, canvas, "channels_first")
    (top, bottom), (left, right) = (
        (-((full - length) // 2) * side / length, (full - (full - length) // 2) * side / length)
        for full, length, side in zip(canvas, resized, image.size, strict=True)
    )
    return left, top, right, bottom


def _box(whole: Box, canvas: Size, start: tuple[float, float], end: tuple[float, float]) -> Box:
    """The part of a canvas between two corners, (top, left) and (bottom, right) in its pixels."""
    left, top, right, bottom = whole
    down, across = (bottom - top) / canvas[0], (right - left) / canvas[1]
    return left + start[1] * across, top + start[0] * down, left + end[1] * across, top + end[0] * down


def _shrunk(box: Box, part: float) -> Box:
    left, top, right, bottom = box
    return left, top, left + (right - left) * part, top + (bottom - top) * part


def _limited(config: Any, grid: Size, side: int) -> Size:
    """The rows and columns after the model has resized them to at most about as many patches as `anyres_max_9` says."""
    limit = getattr(config, "vision_aspect_ratio", "")
    ratio = sqrt(grid[0] * grid[1] / (int(limit.removeprefix("anyres_max_")) * side**2)) if limit else 1.0
    return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid


def _one_of_several(image: ProcessedImage) -> bool:
    """Whether the image is one of several of a prompt, by the numbers of images that the processor returned."""
    if not image.has("batch_num_images"):
        return False
    counts = [int(count) for count in image.entry("batch_num_images")]
    return next(count for index, count in enumerate(counts) if image.number < sum(counts[: index + 1])) > 1


def _square(size: Size) -> Box:
    """The square around an image, with the image in its middle."""
    side = max(size)
    left, top = -((side - size[1]) // 2), -((side - size[0]) // 2)
    return float(left), float(top), float(left + side), float(top + side)
