"""Whether the pixels that the vision tower gets show the part of the image that a layout says.

Settings that are given to a call of the processor are not known afterwards. Where another crop, padding or order of
patches would have the same shape, a few cells are compared with the image itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import ceil, floor, isqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from carve_kernels.hf.layouts.processed_image import ProcessedImage
from carve_kernels.types import Box, Size

Seen = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Convert = Callable[[Image.Image], Image.Image]
# The cells of an image that are compared.
_SAMPLES = 8
# The pixels a side of a cell by which it is known how far it differs from others, and most of them in all.
_POINTS, _MOST_POINTS = 4, 2**14
# Pixels around a cell that the filter of a resize reads, of the original or of a smaller result.
_MARGIN = 4
# The same of a filter that is not Lanczos, towards padding: images are padded before or after they are resized.
_REACH = 2
# A large image is first averaged over whole pixels, which is cheaper, and not seen in cells that are not small, except
# for noise in images that are enlarged along one axis and shrunk along the other: they are compared again without.
_REDUCING_GAP, _SMALL = 3.0, 7
_FILTERS = tuple(Image.Resampling)
_SAMPLING = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
# The modes whose conversion to RGB is known.
_MODES = ("RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "PA", "RGBX")
# Of 255 levels, and of the contrast. Means differ by 0.01 levels between Pillow and torchvision, by half a level on a
# flat image in bfloat16, and by several levels where another part of an image is visible.
_LEVELS, _SHARE = 0.6, 0.005
# The same share where the sizes of the image in between may be other ones.
_STEPS_SHARE = 0.03


class Resize(NamedTuple):
    """How an image processor resizes an image.

    =======  =======================================================================================================
    steps    the sizes to which it may resize the whole image before, in order; several where that is not known
    average  whether a pixel is the average of what it covers, and not what is at its centre (antialias)
    =======  =======================================================================================================
    """

    steps: Sequence[Sequence[Size]] = ((),)
    average: bool = True


AT_ONCE = Resize()


class _Way(NamedTuple):
    """One of the ways to resize an image, and to convert it to RGB."""

    steps: Sequence[Size]
    average: bool
    resample: Image.Resampling
    convert: Convert
    gap: float | None


def check_seen(
    image: ProcessedImage,
    box: Box,
    grid: Size,
    cell: Size,
    seen: Seen,
    resize: Resize = AT_ONCE,
    samples: int = _SAMPLES,
) -> None:
    """Raise ValueError if cells do not show their parts of the image; nothing is known of images given as sizes.

    `seen(rows, columns)` has the means of equal parts of cells over all channels, [cells, down, across].
    """
    original = image.original
    if original is None or original.mode not in _MODES:
        return
    cells = _inside(original, box, grid, cell, samples)
    if not cells:
        return
    rows, columns = (torch.tensor(each) for each in zip(*cells, strict=True))
    values = seen(rows, columns).float().cpu().numpy()
    count, down, across = values.shape
    for way in _ways(image, resize, cell):
        parts = np.stack([_part(image, box, grid, cell, place, way) for place in cells])
        levels = parts.reshape(count, down, cell[0] // down, across, cell[1] // across, 3)
        share = _STEPS_SHARE if way.steps else _SHARE
        if _equal(image.image_processor, values, levels.mean((2, 4), dtype=np.float32), share):
            return
    raise ValueError(
        f"inputs: pixel_values do not show the image of {image.size[0]} x {image.size[1]} as the settings of "
        f"{type(image.image_processor).__name__} make them; give the images that made the inputs, in the order of the "
        "prompts, and give settings to the image processor, not to a call"
    )


def check_pixels(
    image: ProcessedImage,
    box: Box,
    grid: Size,
    cell: Size,
    pixels: torch.Tensor,
    resize: Resize = AT_ONCE,
    samples: int = _SAMPLES,
) -> None:
    """The same for pixels [3, H, W], or those of rows and columns of tiles [rows, columns, 3, H, W].

    If the image is narrower than a cell, rows or columns of one pixel are compared.
    """
    rows, columns = _within(image.size, box, grid, cell)
    down, across = cell[0] if rows else 1, cell[1] if columns else 1
    grid = grid[0] * cell[0] // down, grid[1] * cell[1] // across
    check_seen(image, box, grid, (down, across), _pixels_of(pixels, (down, across)), resize, samples)


def _pixels_of(pixels: torch.Tensor, cell: Size) -> Seen:
    """What `check_seen` reads of pixels: four parts of each cell, or one of a cell of odd sides."""
    parts = (1, 1) if cell[0] % 2 or cell[1] % 2 else (2, 2)
    tiles = pixels if pixels.ndim == 5 else pixels[None, None]
    height, width = tiles.shape[-2:]

    def seen(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        down = (rows[:, None] * cell[0] + torch.arange(cell[0]))[:, :, None]
        across = (columns[:, None] * cell[1] + torch.arange(cell[1]))[:, None, :]
        found = tiles[down // height, across // width, :, down % height, across % width].float().mean(-1)
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


def _inside(original: Image.Image, box: Box, grid: Size, cell: Size, samples: int) -> list[tuple[int, int]]:
    """Some of these cells, in order: half are evenly spaced, half those that differ most from the rest of the image."""
    rows, columns = _within((original.height, original.width), box, grid, cell)
    count = len(rows) * len(columns)
    numbers = set(range(count))
    if count > samples:
        half = samples // 2
        numbers = {number * (count - 1) // (half - 1) for number in range(half)}
        numbers.update(_differences(original, box, grid, rows, columns).argsort()[-half:].tolist())
    return [(rows[number // len(columns)], columns[number % len(columns)]) for number in sorted(numbers)]


def _differences(original: Image.Image, box: Box, grid: Size, rows: list[int], columns: list[int]) -> Any:
    """How far cells are from the median of all of them, by some of their pixels, float [N]."""
    across, down = (box[2] - box[0]) / grid[1], (box[3] - box[1]) / grid[0]
    left, top = box[0] + columns[0] * across, box[1] + rows[0] * down
    right, bottom = box[0] + (columns[-1] + 1) * across, box[1] + (rows[-1] + 1) * down
    bounds = max(0.0, left), max(0.0, top), min(float(original.width), right), min(float(original.height), bottom)
    side = max(1, min(_POINTS, isqrt(_MOST_POINTS // (len(rows) * len(columns)))))
    shape = len(columns) * side, len(rows) * side
    points = np.asarray(original.resize(shape, Image.Resampling.NEAREST, bounds).convert("L"), dtype=np.float32)
    parts = np.abs(points - np.median(points)).reshape(len(rows), side, len(columns), side)
    return parts.mean((1, 3)).ravel()


def _ways(image: ProcessedImage, resize: Resize, cell: Size) -> Iterator[_Way]:
    """The ways to resize and convert an image, that of the processor first: a filter may have been given to a call."""
    own = getattr(image.image_processor, "resample", None)
    first = Image.Resampling.BICUBIC if own is None else Image.Resampling(int(own))
    original = image.original
    transparent = "A" in original.mode or "transparency" in original.info
    filters = sorted(_FILTERS if resize.average else _SAMPLING, key=lambda each: each != first)
    gaps = (_REDUCING_GAP, None) if resize.average and min(cell) > _SMALL else (None,)
    for gap, resample, steps in product(gaps, filters, resize.steps):
        yield _Way(steps, resize.average, resample, _opaque, gap)
        if transparent:
            yield _Way(steps, resize.average, resample, _over_white, gap)


def _opaque(part: Image.Image) -> Image.Image:
    return part.convert("RGB")


def _over_white(part: Image.Image) -> Image.Image:
    part = part.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")


def _part(image: ProcessedImage, box: Box, grid: Size, cell: Size, place: Size, way: _Way) -> Any:
    """A cell of the image, resized as the image processor would, uint8 [height, width, 3]."""
    width, height = (box[2] - box[0]) / grid[1], (box[3] - box[1]) / grid[0]
    left, top = max(0.0, box[0] + place[1] * width), max(0.0, box[1] + place[0] * height)
    right, bottom = min(float(image.size[1]), left + width), min(float(image.size[0]), top + height)
    sizes = [image.size, *way.steps]
    bounds = _scaled((left, top, right, bottom), image.size, sizes[-1])
    return np.asarray(_resized(image.original, sizes, bounds, cell, way))


def _resized(original: Image.Image, sizes: Sequence[Size], bounds: Box, cell: Size, way: _Way) -> Image.Image:
    """A cell of what is within bounds of the last of the sizes to which an image is resized one after another."""
    *before, size = sizes
    source = original
    if before or source.mode != "RGB":
        # The whole image would be resized or converted again for each cell.
        left, top, right, bottom = bounds
        across, down = (
            ceil(_MARGIN * max(1.0, length / out))
            for length, out in zip((right - left, bottom - top), cell[::-1], strict=True)
        )
        corner = max(0, floor(left) - across), max(0, floor(top) - down)
        end = min(size[1], ceil(right) + across), min(size[0], ceil(bottom) + down)
        bounds = left - corner[0], top - corner[1], right - corner[0], bottom - corner[1]
        if before:
            shape = end[1] - corner[1], end[0] - corner[0]
            source = _resized(original, before, _scaled((*corner, *end), size, before[-1]), shape, way)
        else:
            source = way.convert(source.crop((*corner, *end)))
    if not way.average:
        return source.transform(cell[::-1], Image.Transform.EXTENT, bounds, way.resample)
    return source.resize(cell[::-1], way.resample, bounds, reducing_gap=way.gap)


def _scaled(bounds: Box, size: Size, to: Size) -> Box:
    """Bounds within a size as those within another one."""
    across, down = to[1] / size[1], to[0] / size[0]
    return bounds[0] * across, bounds[1] * down, bounds[2] * across, bounds[3] * down


def _equal(processor: Any, values: Any, levels: Any, share: float) -> bool:
    """Whether values are what the processor makes of levels."""
    grey = levels.mean(3)
    contrast = float(np.abs(grey - np.median(grey)).mean())
    bound = _LEVELS + share * contrast
    return any(np.abs(values - found).mean() / scale <= bound for found, scale in _normalised(processor, levels))


def _normalised(processor: Any, levels: Any) -> Iterator[tuple[Any, float]]:
    """What levels of 0 to 255 become, over all channels, with and without a rescale and a normalisation; and of one."""
    factor = float(getattr(processor, "rescale_factor", None) or 1 / 255)
    mean, std = (
        np.atleast_1d(np.asarray(getattr(processor, name, None) or default, dtype=np.float32))
        for name, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    for scale in (factor, 1.0):
        yield ((levels * scale - mean) / std).mean(-1), scale / float(std.mean())
        yield (levels * scale).mean(-1), scale
