"""Whether the pixels that the vision tower gets show the part of the image that a layout says.

Settings that are given to a call of the processor are not known afterwards. Where another crop, padding or order of
patches would have the same shape, a few cells are compared with the image itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from PIL import Image

from carve_kernels.hf.layouts.processed_image import ProcessedImage
from carve_kernels.types import Box, Size

Seen = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Convert = Callable[[Image.Image], Image.Image]
# The cells that are compared, and the pixels a side by which those of the second kind are found.
_SPACED, _DIFFERENT, _POINTS = 4, 4, 4
# Pixels around a cell that the filter of a resize reads, of the original or of a smaller result.
_MARGIN = 4
# The same of a filter that is not Lanczos, towards padding: images are padded before or after they are resized.
_REACH = 2
# A large image is first averaged over whole pixels, which is several times cheaper: in cells that are not small, the
# error is a tenth of the tolerance, except for noise in images that are enlarged along one axis and shrunk along the
# other.
_REDUCING_GAP, _SMALL = 1.5, 7
_FILTERS = tuple(Image.Resampling)
# The modes whose conversion to RGB is known.
_MODES = ("RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "PA", "RGBX")
# Of 255 levels, and of the contrast. Means differ by 0.01 levels between Pillow and torchvision, by half a level on a
# flat image in bfloat16, and by several levels where another part of an image is visible.
_LEVELS, _SHARE = 0.6, 0.005


def check_seen(image: ProcessedImage, box: Box, grid: Size, cell: Size, seen: Seen) -> None:
    """Raise ValueError if cells do not show their parts of the image; nothing is known of images given as sizes.

    `seen(rows, columns)` has the means of equal parts of cells over all channels, [cells, down, across].
    """
    original = image.original
    if original is None or original.mode not in _MODES:
        return
    cells = _inside(original, box, grid, cell)
    if not cells:
        return
    rows, columns = (torch.tensor(each) for each in zip(*cells, strict=True))
    values = seen(rows, columns).float().cpu().numpy()
    count, down, across = values.shape
    gaps = (_REDUCING_GAP, None) if min(cell) > _SMALL else (None,)
    for gap, (resample, convert) in product(gaps, tuple(_conversions(image))):
        parts = np.stack([_part(image, box, grid, cell, place, resample, convert, gap) for place in cells])
        levels = parts.reshape(count, down, cell[0] // down, across, cell[1] // across, 3)
        if _equal(image.image_processor, values, levels.mean((2, 4), dtype=np.float32)):
            return
    raise ValueError(
        f"inputs: pixel_values do not show the image of {image.size[0]} x {image.size[1]} as the settings of "
        f"{type(image.image_processor).__name__} make them; give the images that made the inputs, and give "
        "settings to the image processor, not to a call"
    )


def check_pixels(image: ProcessedImage, box: Box, grid: Size, cell: Size, pixels: torch.Tensor) -> None:
    """The same for pixels [3, H, W]; rows or columns of one pixel if the image is narrower than a cell."""
    rows, columns = _within(image.size, box, grid, cell)
    down, across = cell[0] if rows else 1, cell[1] if columns else 1
    grid = grid[0] * cell[0] // down, grid[1] * cell[1] // across
    check_seen(image, box, grid, (down, across), _pixels_of(pixels, (down, across)))


def _pixels_of(pixels: torch.Tensor, cell: Size) -> Seen:
    """What `check_seen` reads of pixels [3, H, W]: four parts of each cell, or one of a cell of odd sides."""
    parts = (1, 1) if cell[0] % 2 or cell[1] % 2 else (2, 2)

    def seen(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        down, across = (
            first[:, None] * length + torch.arange(length) for first, length in zip((rows, columns), cell, strict=True)
        )
        found = pixels[:, down[:, :, None], across[:, None, :]].float().mean(0)
        return found.view(-1, parts[0], cell[0] // parts[0], parts[1], cell[1] // parts[1]).mean((2, 4))

    return seen


def patches_of(patches: torch.Tensor, grid: Size, merge: Size, raster: bool) -> Seen:
    """What `check_seen` reads of the patches of an image, [n, ...]: row by row, or one merged cell after another.

    Raises ValueError if there are too few.
    """
    count = grid[0] * grid[1] * merge[0] * merge[1]
    if len(patches) < count:
        raise ValueError(f"inputs: expected {count} patches for a grid of {grid[0]} x {grid[1]}, got {len(patches)}")

    def seen(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        down, across = torch.arange(merge[0])[:, None], torch.arange(merge[1])
        if raster:
            first = rows * merge[0] * grid[1] * merge[1] + columns * merge[1]
            index = first[:, None, None] + down * grid[1] * merge[1] + across
        else:
            index = (rows * grid[1] + columns)[:, None, None] * merge[0] * merge[1] + down * merge[1] + across
        return patches[index].float().flatten(3).mean(3)

    return seen


def _within(size: Size, box: Box, grid: Size, cell: Size) -> list[list[int]]:
    """The rows and the columns of a grid that lie within the image, and whose filter reads no padding around it."""
    within = []
    for axis in (0, 1):
        first, last, limit = box[1 - axis], box[3 - axis], size[axis]
        edges = np.linspace(first, last, grid[axis] + 1)
        reach = _REACH * max(1.0, (last - first) / grid[axis] / cell[axis])
        low, high = (reach if first < -0.01 else -0.01), limit - (reach if last > limit + 0.01 else -0.01)
        within.append(((edges[:-1] > low) & (edges[1:] < high)).nonzero()[0].tolist())
    return within


def _inside(original: Image.Image, box: Box, grid: Size, cell: Size) -> list[tuple[int, int]]:
    """Some of these cells, in order: evenly spaced ones, and those that differ most from the rest of the image."""
    rows, columns = _within((original.height, original.width), box, grid, cell)
    count = len(rows) * len(columns)
    numbers = set(range(count))
    if count > _SPACED + _DIFFERENT:
        numbers = {number * (count - 1) // (_SPACED - 1) for number in range(_SPACED)}
        numbers.update(_differences(original, box, grid, rows, columns).argsort()[-_DIFFERENT:].tolist())
    return [(rows[number // len(columns)], columns[number % len(columns)]) for number in sorted(numbers)]


def _differences(original: Image.Image, box: Box, grid: Size, rows: list[int], columns: list[int]) -> Any:
    """How far cells are from the median of all of them, by some of their pixels, float [N]."""
    across, down = (box[2] - box[0]) / grid[1], (box[3] - box[1]) / grid[0]
    left, top = box[0] + columns[0] * across, box[1] + rows[0] * down
    right, bottom = box[0] + (columns[-1] + 1) * across, box[1] + (rows[-1] + 1) * down
    bounds = max(0.0, left), max(0.0, top), min(float(original.width), right), min(float(original.height), bottom)
    shape = len(columns) * _POINTS, len(rows) * _POINTS
    points = np.asarray(original.resize(shape, Image.Resampling.NEAREST, bounds).convert("L"), dtype=np.float32)
    parts = np.abs(points - np.median(points)).reshape(len(rows), _POINTS, len(columns), _POINTS)
    return parts.mean((1, 3)).ravel()


def _conversions(image: ProcessedImage) -> Iterator[tuple[Image.Resampling, Convert]]:
    """The filters and conversions to RGB, those of the processor first: a filter may have been given to a call."""
    own = getattr(image.image_processor, "resample", None)
    first = Image.Resampling.BICUBIC if own is None else Image.Resampling(int(own))
    original = image.original
    transparent = "A" in original.mode or "transparency" in original.info
    for resample in sorted(_FILTERS, key=lambda each: each != first):
        yield resample, _opaque
        if transparent:
            yield resample, _over_white


def _opaque(part: Image.Image) -> Image.Image:
    return part.convert("RGB")


def _over_white(part: Image.Image) -> Image.Image:
    part = part.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")


def _part(
    image: ProcessedImage,
    box: Box,
    grid: Size,
    cell: Size,
    place: Size,
    resample: Image.Resampling,
    convert: Convert,
    gap: float | None,
) -> Any:
    """A cell of the image, resized as the image processor would, uint8 [height, width, 3]."""
    width, height = (box[2] - box[0]) / grid[1], (box[3] - box[1]) / grid[0]
    left, top = max(0.0, box[0] + place[1] * width), max(0.0, box[1] + place[0] * height)
    right, bottom = min(float(image.size[1]), left + width), min(float(image.size[0]), top + height)
    source, bounds = image.original, (left, top, right, bottom)
    if source.mode != "RGB":
        # The whole image would be converted again for each cell.
        across, down = (
            ceil(_MARGIN * max(1.0, side / out)) for side, out in zip((width, height), cell[::-1], strict=True)
        )
        edges = floor(left) - across, floor(top) - down, ceil(right) + across, ceil(bottom) + down
        corner = max(0, edges[0]), max(0, edges[1])
        source = convert(source.crop((*corner, min(image.size[1], edges[2]), min(image.size[0], edges[3]))))
        bounds = left - corner[0], top - corner[1], right - corner[0], bottom - corner[1]
    return np.asarray(source.resize(cell[::-1], resample, bounds, reducing_gap=gap))


def _equal(processor: Any, values: Any, levels: Any) -> bool:
    """Whether values are what the processor makes of levels."""
    grey = levels.mean(3)
    contrast = float(np.abs(grey - np.median(grey)).mean())
    errors = (np.abs(values - found).mean() / scale for found, scale in _normalised(processor, levels))
    return bool(min(errors) <= _LEVELS + _SHARE * contrast)


def _normalised(processor: Any, levels: Any) -> Iterator[tuple[Any, float]]:
    """What levels of 0 to 255 become, over all channels, with and without a rescale and a normalisation; and of one."""
    factor = float(getattr(processor, "rescale_factor", None) or 1 / 255)
    mean, std = (
        np.atleast_1d(np.asarray(getattr(processor, name, None) or default, dtype=np.float32))
        for name, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    for scale in (factor, 1.0):
        yield (levels * scale).mean(-1), scale
        yield ((levels * scale - mean) / std).mean(-1), scale / float(std.mean())
