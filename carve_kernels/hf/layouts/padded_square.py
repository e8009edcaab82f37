"""One run of tokens per image, on the patches of the image that is resized to a side of a square and centred in it.

DeepSeek-VL and Janus. The option `cell` is that of `cells.cell_of`; `first` names the entry with the pixels that were
resized and centred first, from which those of another side were made.
"""

from __future__ import annotations

from carve_kernels.hf.layouts.cells import cell_of
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import View


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view, which reaches outside of the image where it was padded."""
    pixels = tuple(image.item("pixel_values", "[images, 3, H, W]").shape[-2:])
    cell = cell_of(image.config, image.options)
    grid = pixels[0] // cell[0], pixels[1] // cell[1]
    if pixels[0] != pixels[1]:
        raise ValueError(
            f"inputs: expected square pixel_values, got {pixels[0]} x {pixels[1]}; the image must be padded (do_pad)"
        )
    shortest = getattr(image.image_processor, "min_size", 0)
    square = image.item(image.options.get("first", "pixel_values")).shape[-1]
    spans = [
        _span(length, max(image.size), square, count * side * square / pixels[0], shortest)
        for length, count, side in zip(image.size, grid, cell, strict=True)
    ]
    box = spans[1][0], spans[0][0], spans[1][1], spans[0][1]
    check_pixels(image, box, grid, cell, image.item("pixel_values"))
    return (View(tokens.take(grid[0] * grid[1]), grid, box),)


def _span(length: int, longest: int, side: int, covered: float, shortest: int) -> tuple[float, float]:
    """Where the cells begin and end along a side of the image, resized and centred in a side of the square."""
    resized = max(round(length * (side / longest)), shortest)
    start = (side - resized) // 2
    return -start * length / resized, (covered - start) * length / resized
