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

from carve_kernels.hf.layouts.cells import PATCH, attribute, merged, options_of, settings_of, sides
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_seen, patches_of
from carve_kernels.types import Box, Size, View

MERGE = "vision_config.spatial_merge_size"


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


def grid_of(image: ProcessedImage) -> Size:
    """The grid of merged patches. Raises ValueError if the patches do not have the model's size or cannot be merged."""
    frames, *patches = image.item("image_grid_thw", "[images, 3]").tolist()
    if frames != 1:
        raise ValueError(f"inputs: expected image_grid_thw of one frame an image, got {frames}")
    pixels, (height, width) = image.entries.get("pixel_values"), sides(attribute(image.config, PATCH))
    if pixels is not None and pixels[0].numel() % (3 * height * width):
        raise ValueError(
            f"inputs: expected pixel_values of patches of {height} x {width} pixels, as in the model's config, got "
            f"{pixels[0].numel()} numbers a patch"
        )
    return merged("image_grid_thw", patches, merge_of(image))


def check_patches(image: ProcessedImage, grid: Size, box: Box) -> None:
    """Raise ValueError if the patches do not show the image in a box, or not in the order that the model merges."""
    if not image.has("pixel_values"):
        return
    start = int(image.entry("image_grid_thw")[: image.number].prod(1).sum())
    merge, patch = merge_of(image), sides(attribute(image.config, PATCH))
    seen = patches_of(image.entry("pixel_values")[start:], grid, merge, bool(image.options.get("raster")))
    check_seen(image, box, grid, (merge[0] * patch[0], merge[1] * patch[1]), seen)


def merge_of(image: ProcessedImage) -> Size:
    """How many patches become a token, as (rows, columns)."""
    entry = image.options.get("entry")
    return sides(int(image.item(entry)) if entry else attribute(image.config, image.options.get("merge", MERGE)))
