"""One run of tokens per image, on the patches of the resized, and maybe padded or centre-cropped, image (LLaVA-1.5).

===========  =======================================================================================================
option       meaning
===========  =======================================================================================================
cell, ...    as for `cells.cell_of`
square       the attribute of the config with the number of tokens of any image, which are a square grid (Gemma 3n)
stride       the processor's setting with the side of a cell, which the config lacks (FastVLM)
class_token  the tokens of the vision tower are selected by vision_feature_select_strategy, by default without the first
===========  =======================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import ceil, floor, isqrt
from typing import Any

from carve_kernels.hf.layouts.cells import attribute, cell_of, options_of
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import Box, Size, View

# The number of class tokens that a vision tower puts before its patches.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The settings by which the processor counts the tokens that the vision tower returns."""
    options = options_of(config, processor)
    if "stride" in options:
        yield from _strides(processor, options["stride"])
    if options.get("class_token"):
        yield from tower_settings(config, processor)


def tower_settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The patch size, and what selects the tokens of a vision tower that may have a class token.

    Files of older processors lack them; transformers then counts with None, or one token too few.
    """
    patch = config.vision_config.patch_size
    size = getattr(processor, "patch_size", patch)
    yield "patch_size", tuple(size) if isinstance(size, list) else size, patch
    before = _CLASS_TOKENS.get(config.vision_config.model_type)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    count = getattr(processor, "num_additional_image_tokens", 0)
    if isinstance(count, int) and (before is None or _extra_tokens(processor) == before - (strategy == "default")):
        return
    yield "vision_feature_select_strategy", getattr(processor, "vision_feature_select_strategy", strategy), strategy
    if before is None:
        raise ValueError(
            f"processor: num_additional_image_tokens is {count!r}, expected the number of tokens that the model's "
            "vision tower puts before its patches"
        )
    yield "num_additional_image_tokens", count, before


def _strides(processor: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """The settings by which the processor counts a token for each cell."""
    stride = getattr(processor, name, None)
    if not isinstance(stride, int):
        raise ValueError(
            f"processor: {name} is {stride!r}, expected the side of the cells of the model's vision tower in pixels, "
            "which its config does not have"
        )
    strategy = getattr(processor, "vision_feature_select_strategy", None)
    yield "vision_feature_select_strategy", strategy, "full"
    yield "num_additional_image_tokens", getattr(processor, "num_additional_image_tokens", 0), 0


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view of the crop, with the grid from `pixel_values` and the box from the image processor's settings.

    A class token before the patches (vision_feature_select_strategy "full") is in no view.
    """
    pixels = tuple(image.item("pixel_values", "[images, 3, H, W]").shape[-2:])
    patch = _cell(image.config, image.processor, pixels)
    grid, box = (pixels[0] // patch[0], pixels[1] // patch[1]), box_of(image, pixels, patch)
    check_pixels(image, box, grid, patch, image.item("pixel_values"))
    tokens.take(max(0, _extra_tokens(image.processor)))
    return (View(tokens.take(grid[0] * grid[1]), grid, box),)


def box_of(image: ProcessedImage, pixels: tuple[int, ...], cell: Size) -> Box:
    """The part of an image that whole cells of the resized and cropped one cover, whose (height, width) are `pixels`.

    Raises ValueError if the settings of the image processor make another size of the image.
    """
    image_processor, size = image.image_processor, image.size
    expected = _cropped_size(image_processor, _resized_size(image_processor, _padded_size(image_processor, size)))
    if expected != pixels:
        raise ValueError(
            f"inputs: pixel_values are {pixels[0]} x {pixels[1]}, but the settings of "
            f"{type(image_processor).__name__} make {expected[0]} x {expected[1]} of an image of {size[0]} x "
            f"{size[1]}; give the processor and the images that made the inputs, with the same settings"
        )
    return _box(image_processor, size, cell)


def canvas(config: Any, processor: Any, size: Size) -> tuple[Size, int, int]:
    """The image itself if it is not cropped, else the smallest canvas that has it within the crop."""
    image_processor = processor.image_processor
    pixels = _cropped_size(image_processor, _resized_size(image_processor, _padded_size(image_processor, size)))
    patch = _cell(config, processor, pixels)
    left, top, right, bottom = _box(image_processor, size, patch)
    if left <= 0 and top <= 0 and right >= size[1] and bottom >= size[0]:
        return size, 0, 0
    if not getattr(image_processor, "do_resize", True):
        raise ValueError(
            f"fit: expected None, got 'pad': {type(image_processor).__name__} does not resize (do_resize), so it crops "
            f"{size[0]} x {size[1]} pixels on any canvas; shrink the image, or let it resize"
        )
    resized = _resized_size(image_processor, (max(size), max(size)))
    covered = [_covered(image_processor, resized, patch, axis) for axis in (0, 1)]
    visible = [min(end, side) - max(0, first) for (first, end), side in zip(covered, resized, strict=True)]
    scale = max(map(Fraction, size, visible))
    sides = [ceil(scale * side) for side in resized]
    while True:
        # Patches may begin within a pixel of the canvas.
        left, top, right, bottom = _box(image_processor, (sides[0], sides[1]), patch)
        spans = ((top, bottom, sides[0]), (left, right, sides[1]))
        offsets = [
            (ceil(max(0, first)), floor(min(end, side)) - length)
            for (first, end, side), length in zip(spans, size, strict=True)
        ]
        if all(low <= high for low, high in offsets):
            top_left = [(low + high) // 2 for low, high in offsets]
            return (sides[0], sides[1]), top_left[0], top_left[1]
        sides = [side + 1 for side in sides]


def _cell(config: Any, processor: Any, pixels: tuple[int, ...]) -> Size:
    """The pixels of the vision tower's input that a token covers, (height, width)."""
    options = options_of(config, processor)
    if "stride" in options:
        side = int(getattr(processor, options["stride"]))
        return side, side
    if "square" not in options:
        return cell_of(config, options)
    tokens = attribute(config, options["square"])
    side = isqrt(tokens)
    if side**2 != tokens or pixels[0] % side or pixels[1] % side:
        raise ValueError(
            f"inputs: expected pixel_values that {tokens} square tokens cover, as in the model's config, got "
            f"{pixels[0]} x {pixels[1]}"
        )
    return pixels[0] // side, pixels[1] // side


def _extra_tokens(processor: Any) -> int:
    """The number of image tokens in a prompt besides those of the patches; -1 if one is left out."""
    dropped = getattr(processor, "vision_feature_select_strategy", None) == "default"
    return int(getattr(processor, "num_additional_image_tokens", 0)) - dropped


def _covered(image_processor: Any, resized: Size, patch: Size, axis: int) -> tuple[int, int]:
    """The first pixel that patches cover, and the end; outside of the resized image if the crop is larger.

    Image processors on torchvision and on Pillow differ by a pixel if an odd number of pixels is added.
    """
    cropped = _cropped_size(image_processor, resized)[axis]
    excess = resized[axis] - cropped
    torchvision = getattr(image_processor, "backend", "pil") == "torchvision"
    start = int(excess / 2) if torchvision else excess // 2
    return start, start + cropped // patch[axis] * patch[axis]


def _box(image_processor: Any, size: Size, patch: Size) -> Box:
    """The part of the original that the patches cover; it reaches outside of a padded original."""
    padded = _padded_size(image_processor, size)
    resized = _resized_size(image_processor, padded)
    spans = []
    for axis in (0, 1):
        pad = (padded[axis] - size[axis]) // 2
        edges = _covered(image_processor, resized, patch, axis)
        spans.append([edge * padded[axis] / resized[axis] - pad for edge in edges])
    (top, bottom), (left, right) = spans
    return left, top, right, bottom


def _padded_size(image_processor: Any, size: Size) -> Size:
    if not getattr(image_processor, "do_pad", False):
        return size
    if not hasattr(image_processor, "pad_to_square"):
        raise ValueError(f"processor: the padding of {type(image_processor).__name__} is not supported")
    return max(size), max(size)


def _cropped_size(image_processor: Any, resized: Size) -> Size:
    if not getattr(image_processor, "do_center_crop", False):
        return resized
    crop = dict(image_processor.crop_size)
    return crop["height"], crop["width"]


def _resized_size(image_processor: Any, size: Size) -> Size:
    if not getattr(image_processor, "do_resize", True):
        return size
    target = dict(image_processor.size)
    if set(target) == {"height", "width"}:
        return target["height"], target["width"]
    if set(target) == {"shortest_edge"}:
        short = target["shortest_edge"]
        # Truncated, not rounded: transformers' image processors compute the long side so.
        rows, columns = (int(short * side / min(size)) for side in size)
        return rows, columns
    raise ValueError(f"processor: the size {target} of {type(image_processor).__name__} is not supported")
