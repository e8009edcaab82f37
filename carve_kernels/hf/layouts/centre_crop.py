"""One run of tokens an image, on the patches of the resized and centre-cropped picture (LLaVA-1.5 and kin)."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.hf.layouts.placing import Part, Placing, check_count, needed
from carve_kernels.types import Box, Size


def place(config: Any, processor: Any, inputs: Any, sizes: list[Size]) -> list[Placing]:
    """Read the grid from `pixel_values` and the box from the settings of the image processor.

    A class token that the tower puts before the patches (vision_feature_select_strategy "full") is in no view.
    """
    pixels = needed(inputs, "pixel_values")
    if pixels.ndim != 4:
        raise ValueError(f"inputs: expected pixel_values of shape [images, 3, H, W], got {list(pixels.shape)}")
    check_count(len(pixels), sizes)
    patch = config.vision_config.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    shown = pixels.shape[-2], pixels.shape[-1]
    grid = shown[0] // patch_height, shown[1] // patch_width
    covered = grid[0] * patch_height, grid[1] * patch_width
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    lead = max(0, getattr(processor, "num_additional_image_tokens", 0) - dropped)
    count = grid[0] * grid[1]
    columns = torch.arange(lead, lead + count)
    return [
        Placing(count + lead, (Part(columns, grid, _box(processor.image_processor, size, shown, covered)),))
        for size in sizes
    ]


def _box(settings: Any, size: Size, shown: Size, covered: Size) -> Box:
    """The part of the original under the covered pixels; it reaches outside of the original where that was padded."""
    rows, columns = size
    pad = (0, 0)
    if getattr(settings, "do_pad", False):
        if not hasattr(settings, "pad_to_square"):
            raise ValueError(f"processor: the padding of {type(settings).__name__} is not known to this layout")
        side = max(size)
        pad = (side - rows) // 2, (side - columns) // 2
        rows = columns = side
    resized = _resized(settings, (rows, columns))
    cropped = resized
    if getattr(settings, "do_center_crop", False):
        crop = dict(settings.crop_size)
        cropped = crop["height"], crop["width"]
    if cropped != shown:
        raise ValueError(
            f"inputs: pixel_values are {shown[0]} x {shown[1]}, but the settings of {type(settings).__name__} make "
            f"{cropped[0]} x {cropped[1]} of an image of {size[0]} x {size[1]}; give the processor and the images "
            "that made the inputs, with no setting changed in the call"
        )
    spans = []
    for axis, original in enumerate((rows, columns)):
        start = _crop_start(settings, resized[axis] - cropped[axis])
        first, end = (place * original / resized[axis] - pad[axis] for place in (start, start + covered[axis]))
        spans.append((first, end))
    (top, bottom), (left, right) = spans
    return left, top, right, bottom


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
