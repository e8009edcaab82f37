"""One run of tokens an image, on the grid of merged patches; the grid covers the whole image (Qwen2-VL and kin)."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.hf.layouts.placing import Canvas, Kind, Part, Placing, agree, check_count, needed
from carve_kernels.types import Size


def place(config: Any, processor: Any, inputs: Any, sizes: list[Size]) -> list[Placing]:
    """Read the grids from `image_grid_thw`."""
    grids = needed(inputs, "image_grid_thw").tolist()
    check_count(len(grids), sizes)
    merge = config.vision_config.spatial_merge_size
    placings = []
    for (_, patch_rows, patch_columns), (height, width) in zip(grids, sizes, strict=True):
        grid = patch_rows // merge, patch_columns // merge
        count = grid[0] * grid[1]
        box = (0.0, 0.0, float(width), float(height))
        placings.append(Placing(count, (Part(torch.arange(count), grid, box),)))
    return placings


def _check(config: Any, processor: Any) -> None:
    vision, settings = config.vision_config, getattr(processor, "image_processor", None)
    for name, expected in (("patch_size", vision.patch_size), ("merge_size", vision.spatial_merge_size)):
        agree(f"image_processor.{name}", getattr(settings, name, expected), expected)


def _canvas(config: Any, processor: Any, size: Size) -> Canvas:
    return Canvas(size)


KIND = Kind(place, _check, _canvas)
