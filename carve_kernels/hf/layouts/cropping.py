"""What image processors that pad, resize and crop leave of an image, and on which canvas all of it is left."""

from __future__ import annotations

from fractions import Fraction
from itertools import count
from math import ceil, floor
from typing import Any

from carve_kernels.hf.layouts.boxes import part
from carve_kernels.hf.layouts.processed_image import ProcessedImage
from carve_kernels.types import Box, Size


def cropped_box(image: ProcessedImage, pixels: tuple[int, ...], cell: Size) -> Box:
    """The part of an image that whole cells of the resized and cropped one cover, whose (height, width) are `pixels`.

    Raises ValueError if the settings of the image processor make another size of the image.
    """
    image_processor, size = image.image_processor, image.size
    expected = cropped_size(image_processor, size)
    if expected != pixels:
        raise ValueError(
            f"inputs: pixel_values are {pixels[0]} x {pixels[1]}, but the settings of "
            f"{type(image_processor).__name__} make {expected[0]} x {expected[1]} of an image of {size[0]} x "
            f"{size[1]}; give the processor and the images that made the inputs, with the same settings"
        )
    return _box(image_processor, size, cell)


def cropped_size(image_processor: Any, size: Size) -> Size:
    """The size of what an image processor makes of an image."""
    return _sizes(image_processor, size)[2]


def smallest_canvas(image_processor: Any, size: Size, cell: Size) -> tuple[Size, int, int]:
    """The image itself if cells cover all of it, else the smallest canvas on which they do, as (size, top, left)."""
    left, top, right, bottom = _box(image_processor, size, cell)
    if left <= 0 and top <= 0 and right >= size[1] and bottom >= size[0]:
        return size, 0, 0
    if not getattr(image_processor, "do_resize", True):
        raise ValueError(
            f"fit: expected None, got 'pad': {type(image_processor).__name__} does not resize (do_resize), so it crops "
            f"{size[0]} x {size[1]} pixels on any canvas; shrink the image, or let it resize"
        )
    square = max(size), max(size)
    resized = _sizes(image_processor, square)[1]
    spans = zip(*_cells(image_processor, square, cell), resized, strict=True)
    scale = max(map(Fraction, size, (min(end, side) - max(0, start) for start, end, side in spans)))
    for grown in count():
        height, width = (ceil(scale * side) + grown for side in resized)
        # Cells may begin and end within a pixel of the canvas.
        left, top, right, bottom = _box(image_processor, (height, width), cell)
        first = ceil(max(0, top)), ceil(max(0, left))
        last = floor(min(bottom, height)) - size[0], floor(min(right, width)) - size[1]
        if first[0] <= last[0] and first[1] <= last[1]:
            break
    return (height, width), (first[0] + last[0]) // 2, (first[1] + last[1]) // 2


def _box(image_processor: Any, size: Size, cell: Size) -> Box:
    """The part of an image that whole cells cover; it reaches outside of an image that is padded."""
    padded, resized, _ = _sizes(image_processor, size)
    return part(size, resized, *_cells(image_processor, size, cell), padded)


def _cells(image_processor: Any, size: Size, cell: Size) -> tuple[Size, Size]:
    """The corners of the cells, in pixels of the resized image; outside of it if the crop is larger.

    Image processors on torchvision and on Pillow differ by a pixel if an odd number of pixels is added.
    """
    _, resized, cropped = _sizes(image_processor, size)
    torchvision = getattr(image_processor, "backend", "pil") == "torchvision"
    excess = resized[0] - cropped[0], resized[1] - cropped[1]
    top, left = (int(pixels / 2) if torchvision else pixels // 2 for pixels in excess)
    return (top, left), (top + cropped[0] // cell[0] * cell[0], left + cropped[1] // cell[1] * cell[1])


def _sizes(image_processor: Any, size: Size) -> tuple[Size, Size, Size]:
    """The size of an image after it was padded, after it was then resized, and after it was then cropped."""
    padded = size
    if getattr(image_processor, "do_pad", False):
        if not hasattr(image_processor, "pad_to_square"):
            raise ValueError(f"processor: the padding of {type(image_processor).__name__} is not supported")
        padded = max(size), max(size)
    resized = _resized(image_processor, padded) if getattr(image_processor, "do_resize", True) else padded
    if not getattr(image_processor, "do_center_crop", False):
        return padded, resized, resized
    crop = dict(image_processor.crop_size)
    return padded, resized, (crop["height"], crop["width"])


def _resized(image_processor: Any, size: Size) -> Size:
    target = dict(image_processor.size)
    if set(target) == {"height", "width"}:
        return target["height"], target["width"]
    if set(target) == {"shortest_edge"}:
        # Truncated, not rounded: transformers' image processors compute the long side so.
        rows, columns = (int(target["shortest_edge"] * side / min(size)) for side in size)
        return rows, columns
    raise ValueError(f"processor: the size {target} of {type(image_processor).__name__} is not supported")
