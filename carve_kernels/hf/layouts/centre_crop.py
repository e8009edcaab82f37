"""One run of tokens an image, on the patches of the resized and centre-cropped picture (LLaVA-1.5 and kin)."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor
from typing import Any

import torch

from carve_kernels.hf.layouts.placing import Canvas, Kind, Part, Placing, agree, check_count, needed
from carve_kernels.types import Box, Size

# How many tokens a vision tower puts before its patches.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def place(config: Any, processor: Any, inputs: Any, sizes: list[Size]) -> list[Placing]:
    """Read the grid from `pixel_values` and the box from the settings of the image processor.

    A class token that the tower puts before the patches (vision_feature_select_strategy "full") is in no view.
    """
    pixels = needed(inputs, "pixel_values")
    if pixels.ndim != 4:
        raise ValueError(f"inputs: expected pixel_values of shape [images, 3, H, W], got {list(pixels.shape)}")
    check_count(len(pixels), sizes)
    patch = _patch(config)
    shown = pixels.shape[-2], pixels.shape[-1]
    grid = shown[0] // patch[0], shown[1] // patch[1]
    lead = max(0, _added(processor))
    count = grid[0] * grid[1]
    columns = torch.arange(lead, lead + count)
    settings = processor.image_processor
    for size in sizes:
        made = _cropped(settings, _resized(settings, _padded(settings, size)))
        if made != shown:
            raise ValueError(
                f"inputs: pixel_values are {shown[0]} x {shown[1]}, but the settings of {type(settings).__name__} make "
                f"{made[0]} x {made[1]} of an image of {size[0]} x {size[1]}; give the processor and the images "
                "that made the inputs, with no setting changed in the call"
            )
    return [Placing(count + lead, (Part(columns, grid, _box(settings, size, patch)),)) for size in sizes]


def _check(config: Any, processor: Any) -> None:
    """The processor must put as many tokens into a prompt as the vision tower returns.

    Files of older processors do not say how: transformers then counts with None, or a token too few.
    """
    patch = config.vision_config.patch_size
    found = getattr(processor, "patch_size", patch)
    agree("patch_size", tuple(found) if isinstance(found, list) else found, patch)
    before, strategy = _CLASS_TOKENS.get(config.vision_config.model_type), config.vision_feature_select_strategy
    count = getattr(processor, "num_additional_image_tokens", 0)
    if isinstance(count, int) and (before is None or _added(processor) == before - (strategy == "default")):
        return
    agree("vision_feature_select_strategy", getattr(processor, "vision_feature_select_strategy", strategy), strategy)
    if before is None:
        raise ValueError(
            f"processor: num_additional_image_tokens is {count!r}, expected how many tokens the vision tower of this "
            "model puts before its patches"
        )
    agree("num_additional_image_tokens", count, before)


def _canvas(config: Any, processor: Any, size: Size) -> Canvas:
    settings, patch = processor.image_processor, _patch(config)
    left, top, right, bottom = _box(settings, size, patch)
    if left <= 0 and top <= 0 and right >= size[1] and bottom >= size[0]:
        return Canvas(size)
    if not getattr(settings, "do_resize", True):
        raise ValueError(
            f"fit: expected None, got 'pad': {type(settings).__name__} does not resize (do_resize), so it cuts "
            f"{size[0]} x {size[1]} pixels on any canvas; shrink the image, or let it resize"
        )
    resized = _resized(settings, (max(size), max(size)))
    scale = max(Fraction(size[axis], _visible(settings, resized, patch, axis)) for axis in (0, 1))
    sides = [ceil(scale * side) for side in resized]
    while True:
        # Patches may begin within a pixel of the canvas.
        left, top, right, bottom = _box(settings, (sides[0], sides[1]), patch)
        spans = ((top, bottom, sides[0]), (left, right, sides[1]))
        places = [
            (ceil(max(0, first)), floor(min(end, side)) - length)
            for (first, end, side), length in zip(spans, size, strict=True)
        ]
        if all(low <= high for low, high in places):
            return Canvas((sides[0], sides[1]), *((low + high) // 2 for low, high in places))
        sides = [side + 1 for side in sides]


KIND = Kind(place, _check, _canvas)


def _patch(config: Any) -> Size:
    patch = config.vision_config.patch_size
    return (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])


def _added(processor: Any) -> int:
    """How many tokens the processor puts into a prompt beside those of the patches; -1 where it leaves one out."""
    dropped = getattr(processor, "vision_feature_select_strategy", None) == "default"
    return int(getattr(processor, "num_additional_image_tokens", 0)) - dropped


def _visible(settings: Any, resized: Size, patch: Size, axis: int) -> int:
    """How many pixels of a side of the resized picture lie under patches."""
    cropped = _cropped(settings, resized)[axis]
    start = _crop_start(settings, resized[axis] - cropped)
    return min(start + cropped // patch[axis] * patch[axis], resized[axis]) - max(0, start)


def _box(settings: Any, size: Size, patch: Size) -> Box:
    """The part of the original under the patches; it reaches outside of the original where that was padded."""
    padded = _padded(settings, size)
    resized = _resized(settings, padded)
    cropped = _cropped(settings, resized)
    spans = []
    for axis in (0, 1):
        start = _crop_start(settings, resized[axis] - cropped[axis])
        covered = cropped[axis] // patch[axis] * patch[axis]
        pad = (padded[axis] - size[axis]) // 2
        first, end = (place * padded[axis] / resized[axis] - pad for place in (start, start + covered))
        spans.append((first, end))
    (top, bottom), (left, right) = spans
    return left, top, right, bottom


def _padded(settings: Any, size: Size) -> Size:
    if not getattr(settings, "do_pad", False):
        return size
    if not hasattr(settings, "pad_to_square"):
        raise ValueError(f"processor: the padding of {type(settings).__name__} is not known to this layout")
    return max(size), max(size)


def _cropped(settings: Any, resized: Size) -> Size:
    if not getattr(settings, "do_center_crop", False):
        return resized
    crop = dict(settings.crop_size)
    return crop["height"], crop["width"]


def _resized(settings: Any, size: Size) -> Size:
    if not getattr(settings, "do_resize", True):
        return size
    wanted = dict(settings.size)
    if set(wanted) == {"height", "width"}:
        return wanted["height"], wanted["width"]
    if set(wanted) == {"shortest_edge"}:
        short = wanted["shortest_edge"]
        # Cut off, not rounded: the long side as the image processors of transformers compute it.
        rows, columns = (int(short * side / min(size)) for side in size)
        return rows, columns
    raise ValueError(f"processor: the size {wanted} of {type(settings).__name__} is not known to this layout")


def _crop_start(settings: Any, excess: int) -> int:
    """First kept pixel; negative where the crop is larger than the picture.

    The two families of image processors differ by a pixel where an odd number of pixels is added.
    """
    if getattr(settings, "backend", "pil") == "torchvision":
        return int(excess / 2)
    return excess // 2
