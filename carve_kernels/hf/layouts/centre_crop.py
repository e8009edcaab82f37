"""One run of tokens per image, on the patches of the resized, and maybe padded or centre-cropped, image (LLaVA-1.5).

===========  =======================================================================================================
option       meaning
===========  =======================================================================================================
cell, ...    as for `cells.cell_of`
class_token  the tokens of the vision tower are selected by vision_feature_select_strategy, by default without the first
===========  =======================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from carve_kernels.hf.layouts.cells import PATCH, cell_of, options_of, settings_of
from carve_kernels.hf.layouts.cropping import cropped_box, smallest_canvas
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import Size, View

# The number of class tokens that a vision tower puts before its patches.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The patch size, and the settings by which the processor counts the tokens that the vision tower returns.

    Files of older processors lack them; transformers then counts with None, or one token too few.
    """
    if not options_of(config, processor).get("class_token"):
        return
    yield from settings_of(config, processor, {"patch_size": PATCH})
    before = _CLASS_TOKENS.get(config.vision_config.model_type)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    count = getattr(processor, "num_additional_image_tokens", 0)
    if isinstance(count, int) and (before is None or _extra_tokens(processor) == before - (strategy == "default")):
        return
    yield "vision_feature_select_strategy", getattr(processor, "vision_feature_select_strategy", strategy), strategy
    if before is None:
        raise ValueError(
            f"processor: num_additional_image_tokens is {count!r}, expected the number of tokens that the model's "
            "vision tower puts before its patches"
        )
    yield "num_additional_image_tokens", count, before


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view of the crop, with the grid from `pixel_values` and the box from the image processor's settings."""
    pixels, cell = image.item("pixel_values", "[images, 3, H, W]"), cell_of(image.config, image.options)
    height, width = pixels.shape[-2:]
    grid, box = (height // cell[0], width // cell[1]), cropped_box(image, (height, width), cell)
    check_pixels(image, box, grid, cell, pixels)
    # A class token before the patches is in no view.
    tokens.take(max(0, _extra_tokens(image.processor)))
    return (View(tokens.take(grid[0] * grid[1]), grid, box),)


def canvas(config: Any, processor: Any, size: Size) -> tuple[Size, int, int]:
    """The image itself if it is not cropped, else the smallest canvas that has it within the crop."""
    return smallest_canvas(processor.image_processor, size, cell_of(config, options_of(config, processor)))


def _extra_tokens(processor: Any) -> int:
    """The number of image tokens in a prompt besides those of the patches; -1 if one is left out."""
    dropped = getattr(processor, "vision_feature_select_strategy", None) == "default"
    return int(getattr(processor, "num_additional_image_tokens", 0)) - dropped
