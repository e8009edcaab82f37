"""One grid of an image that was resized as a whole, with its resized size in `image_sizes` (Pixtral, Emu3).

========  ===========================================================================================================
option    meaning
========  ===========================================================================================================
cell ...  as for `cells.cell_of`
settings  the attributes of the processor that must equal attributes of the config, or a side of a cell if that is None
newlines  a token with the id of the image token follows each row
========  ===========================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from carve_kernels.hf.layouts.boxes import covered
from carve_kernels.hf.layouts.cells import cell_of, options_of, settings_of, sides
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import Size, View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The sizes by which the processor counts tokens, and that it does not crop."""
    options = options_of(config, processor)
    side = cell_of(config, options)[0]
    names = {name: side if path is None else path for name, path in options["settings"].items()}
    yield from settings_of(config, processor, names)
    yield "image_processor.do_center_crop", bool(getattr(processor.image_processor, "do_center_crop", False)), False


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view of the whole cells; what remains of the image at the right and the bottom has no token."""
    height, width = image.item("image_sizes")
    resized, cell = (int(height), int(width)), cell_of(image.config, image.options)
    if image.original is None:
        _check_shape(image.size, resized, max(*cell, *sides(getattr(image.image_processor, "patch_size", cell))))
    rows, columns = grid = resized[0] // cell[0], resized[1] // cell[1]
    box = covered(image.size, resized, grid, cell)
    check_pixels(image, box, grid, cell, image.item("pixel_values"))
    found = tokens.take_rows(*grid).flatten() if image.options.get("newlines") else tokens.take(rows * columns)
    return (View(found, grid, box),)


def _check_shape(size: Size, resized: Size, step: int) -> None:
    """Raise ValueError if no resize of the whole image, with sides rounded to a step, has this size: it was cropped."""
    lowest = max((length - step) / full for length, full in zip(resized, size, strict=True))
    highest = min((length + step) / full for length, full in zip(resized, size, strict=True))
    if lowest >= highest:
        raise ValueError(
            f"inputs: image_sizes has {resized[0]} x {resized[1]} for an image of {size[0]} x {size[1]}, which was "
            "cropped or stretched; give the processor and the images that made the inputs, without do_center_crop"
        )
