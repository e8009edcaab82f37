"""Views to pixels: the saliencies of several views of one image become one, and pixels of no view are unseen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import interpolate

from carve_kernels.ops.regions import regions
from carve_kernels.presets import Preset
from carve_kernels.types import Box, Regions, Size

Rectangle = tuple[int, int, int, int]

# The edge that two tiles share may differ by a rounding, which must not leave a gap of a pixel between them.
_DIGITS = 6


def rectangle(box: Box, size: Size) -> Rectangle | None:
    """A box in whole pixels, at least one of them inside an image of (height, width); None if it is beside the image.

    It reaches outside of the image where the box reaches into padding by more than half a pixel.
    """
    (left, right), (top, bottom) = (_span(box[axis], box[axis + 2], size[1 - axis]) for axis in (0, 1))
    return None if right <= 0 or bottom <= 0 or left >= size[1] or top >= size[0] else (left, top, right, bottom)


def density(grid: Size, box: Box) -> float:
    """Tokens per pixel of the area of a view."""
    left, top, right, bottom = box
    return grid[0] * grid[1] / ((right - left) * (bottom - top))


def seen_pixels(rectangles: Iterable[Rectangle | None], size: Size, device: torch.device) -> torch.Tensor:
    """The pixels of an image that some view covers, bool [H, W]."""
    seen = torch.zeros(size, dtype=torch.bool, device=device)
    for each in rectangles:
        if each is not None:
            seen[_inside(each, size)] = True
    return seen


def combine(
    views: Iterable[torch.Tensor],
    rectangles: Sequence[Rectangle | None],
    densities: Sequence[float],
    size: Size,
    overlap: str,
) -> torch.Tensor:
    """One saliency [H, W] from those of views, each on the pixels of its rectangle; 0 where there is no view.

    Where views overlap it is their mean, weighted by their tokens per area ("mean"), or the highest value ("max").
    A pixel of one view has exactly its value. What reaches outside of the image is cut away.
    """
    saliency = weight = torch.empty(0)
    for view, each, share in zip(views, rectangles, densities, strict=True):
        if not saliency.numel():
            saliency, weight = view.new_zeros(size), view.new_zeros(size)
        if each is None:
            continue
        rows, columns = inside = _inside(each, size)
        values = view[_moved(rows, each[1]), _moved(columns, each[0])]
        before = saliency[inside]
        if overlap == "max":
            # Contrasts are never below the 0 of pixels without a view.
            torch.maximum(before, values, out=before)
            continue
        weight[inside] += share
        # Not a sum that is divided at the end, which would round the values of a single view.
        before += (values - before) * (share / weight[inside])
    return saliency


def paste(view: torch.Tensor, each: Rectangle | None, saliency: torch.Tensor) -> torch.Tensor:
    """Write the only view of an image on the pixels of its rectangle in a saliency [H, W], and 0 where it is not."""
    saliency.zero_()
    if each is not None:
        rows, columns = inside = _inside(each, (saliency.shape[0], saliency.shape[1]))
        saliency[inside] = view[_moved(rows, each[1]), _moved(columns, each[0])]
    return saliency


def widened(grid: torch.Tensor, size: Size, out: torch.Tensor | None = None) -> torch.Tensor:
    """The map of a view [GH, GW] on pixels [H, W], as every contrast is widened to them; written into `out`."""
    if out is None:
        return interpolate(grid[None, None], size, mode="bilinear", antialias=True)[0, 0]
    # `interpolate` has no `out`.
    torch.ops.aten._upsample_bilinear2d_aa.out(grid[None, None], list(size), False, None, None, out=out[None, None])
    return out


def on_pixels(maps: Sequence[torch.Tensor], boxes: Sequence[Box], size: Size) -> torch.Tensor:
    """The maps of views [GH, GW] on the pixels of their image of (height, width), as `combine` does, [H, W]."""
    rectangles = [rectangle(box, size) for box in boxes]
    shapes = [(1, 1) if each is None else (each[3] - each[1], each[2] - each[0]) for each in rectangles]
    views = (widened(view, shape) for view, shape in zip(maps, shapes, strict=True))
    grids = [(view.shape[0], view.shape[1]) for view in maps]
    return combine(views, rectangles, list(map(density, grids, boxes)), size, "mean")


def select(saliency: torch.Tensor, seen: torch.Tensor, preset: Preset, backend: str) -> Regions:
    """`regions` of the seen pixels of a saliency that is not negative, in pixels of the whole image.

    `keep` is a share of the seen pixels, and no others are selected.
    """
    left, top, right, bottom = rectangle_of(seen)
    found = select_all(saliency[top:bottom, left:right], seen[top:bottom, left:right], preset, backend)
    if found.reason is not None:
        return Regions.whole(saliency, found.reason)
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    mask[top:bottom, left:right] = found.mask
    x0, y0, x1, y1 = found.box
    boxes = found.boxes + found.boxes.new_tensor((left, top, left, top))
    return Regions(mask, boxes, found.scores, (x0 + left, y0 + top, x1 + left, y1 + top))


def select_all(saliency: torch.Tensor, seen: torch.Tensor, preset: Preset, backend: str) -> Regions:
    """`select` for a saliency [H, W] or [F, H, W] whose edges are those of the seen pixels, or near them."""
    return _regions(saliency, preset, backend) if bool(seen.all()) else _select(saliency, seen, preset, backend)


def rectangle_of(mask: torch.Tensor) -> Rectangle:
    """The rectangle around the True pixels of a mask [H, W] that has some."""
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _regions(saliency: torch.Tensor, preset: Preset, backend: str) -> Regions:
    over_frames = {4: 6, 8: 26}[preset.connectivity]
    return regions(
        saliency, keep=preset.keep, top=preset.top, floor=preset.floor, score=preset.score, backend=backend,
        connectivity=over_frames if saliency.dim() == 3 else preset.connectivity,
    )  # fmt: skip


def _select(saliency: torch.Tensor, seen: torch.Tensor, preset: Preset, backend: str) -> Regions:
    """Regions where some pixels are unseen: these get a value below all others, and the share of pixels is adapted."""
    values = saliency[seen]
    flat = regions(values[None], keep=1.0, top=1, backend=backend)
    if flat.reason is not None:
        return flat
    filled = torch.where(seen, saliency, -values.amax())
    # The percentile of all pixels that is the one of the seen pixels.
    keep = preset.keep * max(1, values.numel() - 1) / (filled.numel() - 1)
    top = preset.top
    if preset.floor is not None:
        every = _regions(filled, replace(preset, keep=keep, top=filled.numel(), floor=None), backend)
        top = max(preset.floor, int(len(every.boxes) * preset.keep))
    return _regions(filled, replace(preset, keep=keep, top=top, floor=None), backend)


def _inside(each: Rectangle, size: Size) -> tuple[slice, slice]:
    """The rows and columns of a rectangle that are inside of an image."""
    left, top, right, bottom = each
    return slice(max(top, 0), min(bottom, size[0])), slice(max(left, 0), min(right, size[1]))


def _moved(part: slice, start: int) -> slice:
    return slice(part.start - start, part.stop - start)


def _span(first: float, end: float, length: int) -> tuple[int, int]:
    first, end = round(first, _DIGITS), round(end, _DIGITS)
    if end <= 0 or first >= length:
        return length, length
    low = round(first) if first < -0.5 else min(max(0, round(first)), length - 1)
    high = round(end) if end > length + 0.5 else min(round(end), length)
    return low, max(max(low, 0) + 1, high)
