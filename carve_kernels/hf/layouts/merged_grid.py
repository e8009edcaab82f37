"""One run of tokens per image, on the grid of merged patches, which covers the whole image (Qwen2-VL)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from carve_kernels.types import Size, View

ENTRY, SHAPE = "image_grid_thw", "[images, 3]"


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The patch and merge sizes."""
    vision, image_processor = config.vision_config, getattr(processor, "image_processor", None)
    for name, expected in (("patch_size", vision.patch_size), ("merge_size", vision.spatial_merge_size)):
        yield f"image_processor.{name}", getattr(image_processor, name, expected), expected


def views(config: Any, processor: Any, entry: torch.Tensor, sizes: list[Size]) -> list[tuple[int, tuple[View, ...]]]:
    """A view of each whole image, with the grid from `image_grid_thw`."""
    merge = config.vision_config.spatial_merge_size
    grids = [(patch_rows // merge, patch_columns // merge) for _, patch_rows, patch_columns in entry.tolist()]
    boxes = [(0.0, 0.0, float(width), float(height)) for height, width in sizes]
    counts = [rows * columns for rows, columns in grids]
    return [
        (count, (View(torch.arange(count), grid, box),)) for count, grid, box in zip(counts, grids, boxes, strict=True)
    ]


def canvas(config: Any, processor: Any, size: Size) -> tuple[Size, int, int]:
    """The image itself, which is never cropped."""
    return size, 0, 0
