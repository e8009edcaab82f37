"""One run of tokens per image, on the patches of the image that is resized to a side of a square and centred in it.

DeepSeek-VL and Janus. The option `cell` is that of `cells.cell_of`; `first` names the entry with the pixels that were
resized and centred first, from which those of another side were made.
"""

from __future__ import annotations

from carve_kernels.hf.layouts.boxes import part
from carve_kernels.hf.layouts.cells import cell_of
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import Size, View


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view, which reaches outside of the image where it was padded."""
    pixels = tuple(image.item("pixel_values", "[images, 3, H, W]").shape[-2:])
    cell = cell_of(image.config, image.options)
    grid = pixels[0] // cell[0], pixels[1] // cell[1]
    if pixels[0] != pixels[1]:
        raise ValueError(
            f"inputs: expected square pixel_values, got {pixels[0]} x {pixels[1]}; the image must be padded (do_pad)"
        )
    square = image.item(image.options.get("first", "pixel_values")).shape[-1]
    resized = _resized(image.size, square, getattr(image.image_processor, "min_size", 0))
    top, left = (-((square - length) // 2) for length in resized)
    scale = square / pixels[0]
    end = top + grid[0] * cell[0] * scale, left + grid[1] * cell[1] * scale
    box = part(image.size, resized, (top, left), end)
    check_pixels(image, box, grid, cell, image.item("pixel_values"))
    return (View(tokens.take(grid[0] * grid[1]), grid, box),)


def _resized(size: Size, side: int, shortest: int) -> Size:
    """The size of an image whose long side becomes that of the square."""
    scale = side / max(size)
    return max(round(size[0] * scale), shortest), max(round(size[1] * scale), shortest)
