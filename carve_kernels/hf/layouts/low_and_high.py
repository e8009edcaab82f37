"""The whole image on few tokens, then on more of them, which overlapping crops show (Molmo2)."""

from __future__ import annotations

from math import isqrt

import torch

from carve_kernels.hf.layouts.boxes import part
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import Resize, check_seen, patches_of
from carve_kernels.types import Box, View, ViewKind


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """Both views, with the grids from `image_grids` and the patches of each token from `image_token_pooling`."""
    low_rows, low_columns, rows, columns = image.item("image_grids", "[images, 4]").tolist()
    counts = [grid[0] * grid[1] + grid[2] * grid[3] for grid in image.entry("image_grids").tolist()]
    start = sum(counts[: image.number])
    pooling = image.entry("image_token_pooling", "[tokens, patches]")[start : start + counts[image.number]]
    _check(image)
    found = []
    kinds: tuple[ViewKind, ViewKind] = ("base", "tile")
    for grid, kind in zip(((low_rows, low_columns), (rows, columns)), kinds, strict=True):
        count = grid[0] * grid[1]
        if count:
            found.append(View(tokens.take(count), grid, _box(image, pooling[:count].view(*grid, -1)), kind=kind))
        pooling = pooling[count:]
    return tuple(found)


def _check(image: ProcessedImage) -> None:
    """Raise ValueError if the crop of the whole image does not show it."""
    patches = image.entry("pixel_values", "[crops, patches, values]")
    crop = int(image.entry("image_num_crops")[: image.number].sum())
    grid, cell = ((isqrt(number),) * 2 for number in (patches.shape[1], patches.shape[2] // 3))
    seen = patches_of(patches[crop], grid, (1, 1), raster=True)
    check_seen(image, image.box, grid, cell, seen, Resize(average=False))


def _box(image: ProcessedImage, pooling: torch.Tensor) -> Box:
    """The whole image, and what the patches that are missing at its edges would show: they are -1 in `pooling`."""
    height, width = image.image_processor.pooling_size
    if height * width != pooling.shape[-1]:
        raise ValueError(
            f"processor: image_processor.pooling_size is {[height, width]}, the inputs have {pooling.shape[-1]} "
            "patches a token; set it as it was for the inputs"
        )
    exists = pooling.unflatten(-1, (height, width)).transpose(1, 2).flatten(2, 3).flatten(0, 1) >= 0
    rows, columns = exists.any(1), exists.any(0)
    # The patches within the image are its resized copy, in pixels of the size of a patch.
    start = -int(rows.int().argmax()), -int(columns.int().argmax())
    end = start[0] + len(rows), start[1] + len(columns)
    return part(image.size, (int(rows.sum()), int(columns.sum())), start, end)
