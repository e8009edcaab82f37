"""One run of tokens per image, on the patches of the image that is resized to a side of a square and centred in it.

DeepSeek-VL and Janus. The option `cell` is that of `cells.cell_of`.
"""

from __future__ import annotations

from carve_kernels.hf.layouts.cells import cell_of
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_seen, pixels_of
from carve_kernels.types import Box, Size, View


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view, which reaches outside of the image where it was padded."""
    pixels = tuple(image.item("pixel_values", "[images, 3, H, W]").shape[-2:])
    cell = cell_of(image.config, image.options)
    grid = pixels[0] // cell[0], pixels[1] // cell[1]
    box = square(image.size, max(pixels), getattr(image.image_processor, "min_size", 0))
    if pixels[0] != pixels[1]:
        raise ValueError(
            f"inputs: expected square pixel_values, got {pixels[0]} x {pixels[1]}; the image must be padded (do_pad)"
        )
    check_seen(image, box, grid, cell, pixels_of(image.item("pixel_values"), cell))
    return (View(tokens.take(grid[0] * grid[1]), grid, box),)


def square(size: Size, side: int, shortest: int = 0) -> Box:
    """The box of a square in which an image was centred after its long side was resized to that of the square."""
    (top, bottom), (left, right) = (_span(length, max(size), side, shortest) for length in size)
    return left, top, right, bottom


def _span(length: int, longest: int, side: int, shortest: int) -> tuple[float, float]:
    resized = max(round(length * side / longest), shortest)
    start = (side - resized) // 2
    return -start * length / resized, (side - start) * length / resized
