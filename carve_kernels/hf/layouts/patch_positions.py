"""One run of tokens per image, on the pooled grid of the positions in `image_position_ids` (Gemma 4).

=======  ============================================================================================================
option   meaning
=======  ============================================================================================================
pooled   the positions are those of pooled patches already
=======  ============================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

from carve_kernels.hf.layouts.cells import PATCH, attribute, merged, settings_of
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_seen, patches_of
from carve_kernels.types import View

POOLING = "vision_config.pooling_kernel_size"


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The patch size and the pooling."""
    names = {"image_processor.patch_size": PATCH, "image_processor.pooling_kernel_size": POOLING}
    yield from settings_of(config, processor, names)


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view of the whole image. Padding has the position -1."""
    columns, rows = (int(side) + 1 for side in image.item("image_position_ids", "[images, patches, 2]").amax(0))
    pooling = 1 if image.options.get("pooled") else attribute(image.config, POOLING)
    grid = merged("image_position_ids", (rows, columns), (pooling, pooling))
    pixels = image.item("pixel_values", "[images, patches, values]")
    side = isqrt(pixels.shape[-1] // 3)
    seen = patches_of(pixels, (rows, columns), (1, 1), raster=True)
    check_seen(image, image.box, (rows, columns), (side, side), seen)
    return (View(tokens.take(grid[0] * grid[1]), grid, image.box),)
