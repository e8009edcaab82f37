"""One run of tokens per image, on the grid of merged patches, which covers the whole image (Qwen2-VL)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.types import View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The patch and merge sizes."""
    vision, image_processor = config.vision_config, getattr(processor, "image_processor", None)
    for name, expected in (("patch_size", vision.patch_size), ("merge_size", vision.spatial_merge_size)):
        yield f"image_processor.{name}", getattr(image_processor, name, expected), expected


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view of the whole image, with the grid from `image_grid_thw`."""
    merge = image.config.vision_config.spatial_merge_size
    _, patch_rows, patch_columns = image.item("image_grid_thw", "[images, 3]").tolist()
    grid = patch_rows // merge, patch_columns // merge
    return (View(tokens.take(grid[0] * grid[1]), grid, image.box),)
