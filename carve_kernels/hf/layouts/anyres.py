"""Canvases of LLaVA-NeXT's tiles (anyres): size, parts, and patches that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import groupby
from math import sqrt
from typing import Any

import numpy as np
import torch

from carve_kernels.hf.layouts.boxes import part
from carve_kernels.hf.layouts.cells import sides
from carve_kernels.hf.layouts.processed_image import ProcessedImage
from carve_kernels.hf.layouts.tiling import function_of
from carve_kernels.types import Box, Size


def tiles_of(image: ProcessedImage) -> torch.Tensor:
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


def canvas_size(image: ProcessedImage, pixels: torch.Tensor) -> Size:
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


def part_of_canvas(image: ProcessedImage, canvas: Size, start: tuple[float, float], end: tuple[float, float]) -> Box:
    """The box between two corners in pixels of the canvas, with the image in its middle."""
    blank = np.broadcast_to(np.uint8(0), (3, *image.size))
    resized = function_of(image.image_processor, "get_patch_output_size")(blank, canvas, "channels_first")
    top, left = ((full - length) // 2 for full, length in zip(canvas, resized, strict=True))
    return part(image.size, resized, (start[0] - top, start[1] - left), (end[0] - top, end[1] - left))


def unpadded(size: Size, patches: Size) -> tuple[Size, Size]:
    """The first row and column of the canvas's patches that the model keeps, and how many it keeps."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    kept = unpad_image(torch.arange(patches[0] * patches[1]).view(1, *patches), size)[0]
    first = divmod(int(kept[0, 0]), patches[1]) if kept.numel() else (0, 0)
    return first, (kept.shape[0], kept.shape[1])


def limited(config: Any, grid: Size, side: int) -> Size:
    """The rows and columns after the model has resized them to at most about as many patches as `anyres_max_9` says."""
    limit = getattr(config, "vision_aspect_ratio", "")
    ratio = sqrt(grid[0] * grid[1] / (int(limit.removeprefix("anyres_max_")) * side**2)) if limit else 1.0
    return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid


def runs_of(
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
