"""One run of tokens per image, on the patches of the resized, and maybe padded or centre-cropped, image (LLaVA-1.5).

===========  =======================================================================================================
option       meaning
===========  =======================================================================================================
cell, ...    as for `cells.cell_of`
square       the attribute of the config with the number of tokens of any image, which are a square grid (Gemma 3n)
stride       the processor's setting with the side of a cell, which the config lacks (FastVLM)
class_token  the tokens of the vision tower are selected by vision_feature_select_strategy, by default without the first
===========  =======================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

from carve_kernels.hf.layouts.cells import attribute, cell_of, options_of, sides
from carve_kernels.hf.layouts.cropping import cropped_box, cropped_size, smallest_canvas
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.hf.layouts.towers import extra_tokens, stride_settings, tower_settings
from carve_kernels.types import Size, View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The settings by which the processor counts the tokens that the vision tower returns."""
    options = options_of(config, processor)
    if "stride" in options:
        yield from stride_settings(processor, options["stride"])
    if options.get("class_token"):
        yield from tower_settings(config, processor)


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view of the crop, with the grid from `pixel_values` and the box from the image processor's settings."""
    pixels = image.item("pixel_values", "[images, 3, H, W]")
    height, width = pixels.shape[-2:]
    cell = _cell(image.config, image.processor, (height, width))
    grid, box = (height // cell[0], width // cell[1]), cropped_box(image, (height, width), cell)
    check_pixels(image, box, grid, cell, pixels)
    # A class token before the patches is in no view.
    tokens.take(max(0, extra_tokens(image.processor)))
    return (View(tokens.take(grid[0] * grid[1]), grid, box),)


def canvas(config: Any, processor: Any, size: Size) -> tuple[Size, int, int]:
    """The image itself if it is not cropped, else the smallest canvas that has it within the crop."""
    image_processor = processor.image_processor
    return smallest_canvas(image_processor, size, _cell(config, processor, cropped_size(image_processor, size)))


def _cell(config: Any, processor: Any, pixels: Size) -> Size:
    """The pixels of the vision tower's input that a token covers, (height, width)."""
    options = options_of(config, processor)
    if "stride" in options:
        return sides(getattr(processor, options["stride"]))
    if "square" not in options:
        return cell_of(config, options)
    tokens = attribute(config, options["square"])
    side = isqrt(tokens)
    if side**2 != tokens or pixels[0] % side or pixels[1] % side:
        raise ValueError(
            f"inputs: expected pixel_values that {tokens} square tokens cover, as in the model's config, got "
            f"{pixels[0]} x {pixels[1]}"
        )
    return pixels[0] // side, pixels[1] // side
