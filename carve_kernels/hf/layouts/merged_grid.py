"""One run of tokens per image, on the grid of merged patches from `image_grid_thw`, which covers the whole image.

======  ============================================================================================================
option  meaning
======  ============================================================================================================
merge   the attribute of the config with the merge size; by default that of Qwen2-VL
entry   the entry of the processor's output with the merge size of each image, which then is not in the config
raster  patches lie row by row; by default those of a merged cell follow each other
lines   the run also has a token before the first row, one after each row, and one after the last row (HunYuan-VL)
======  ============================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from carve_kernels.hf.layouts.cells import PATCH, options_of, settings_of
from carve_kernels.hf.layouts.merged_patches import MERGE, check_patches, grid_of
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.types import View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The patch and merge sizes, and what the prompts of HunYuan-VL need."""
    options = options_of(config, processor)
    names: dict[str, Any] = {"image_processor.patch_size": PATCH}
    if "entry" not in options:
        names["image_processor.merge_size"] = options.get("merge", MERGE)
    if options.get("lines"):
        names |= {"cat_extra_token": True, "image_processor.spatial_patch_size": 1}
    yield from settings_of(config, processor, names)


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view of the whole image."""
    rows, columns = grid = grid_of(image)
    check_patches(image, grid, image.box)
    if not image.options.get("lines"):
        return (View(tokens.take(rows * columns), grid, image.box),)
    tokens.take(1)
    found = tokens.take_rows(rows, columns).flatten()
    tokens.take(1)
    return (View(found, grid, image.box),)
