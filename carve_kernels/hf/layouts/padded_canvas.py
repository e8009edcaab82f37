"""The canvas of tiles on which an image lies at the top left with its own shape, padded with black (Llama 4)."""

from __future__ import annotations

import torch

from carve_kernels.hf.layouts.boxes import covered
from carve_kernels.hf.layouts.processed_image import ProcessedImage
from carve_kernels.hf.layouts.tiling import function_of
from carve_kernels.types import Box, Size


def canvas_box(image: ProcessedImage, tiles: Size) -> Box:
    """The canvas of rows and columns of tiles, in pixels of the image.

    An image is enlarged to a tile, or to the canvas with `resize_to_max_canvas`, which may be given for one call:
    whether it was is seen where only the larger image is not black.
    """
    side = image.entry("pixel_values").shape[-1]
    canvas = torch.tensor(tiles) * side
    limited = tuple(min(max(length, side), end) for length, end in zip(image.size, canvas, strict=True))
    small, large = (_fit(image, target) for target in (limited, tuple(canvas)))
    enlarged = small != large and not _is_black(image, tiles, small, large)
    if small != large and not enlarged and image.image_processor.resize_to_max_canvas:
        raise ValueError(
            "inputs: expected the image on all of its canvas of tiles, as with resize_to_max_canvas, got black below "
            "it; set processor.image_processor.resize_to_max_canvas as it was for the inputs"
        )
    return covered(image.size, large if enlarged else small, tiles, (side, side))


def _fit(image: ProcessedImage, target: tuple[torch.Tensor | int, ...]) -> Size:
    rows, columns = function_of(image.image_processor, "get_max_res_without_distortion")(image.size, target)
    return max(int(rows), 1), max(int(columns), 1)


def _is_black(image: ProcessedImage, tiles: Size, small: Size, large: Size) -> bool:
    """Whether the pixels of the larger image beyond the smaller one are black, along the side that grows more."""
    axis = 0 if large[0] - small[0] >= large[1] - small[1] else 1
    pixels = image.entry("pixel_values", "[tiles, 3, H, W]")[image.before :][: tiles[0] * tiles[1]].unflatten(0, tiles)
    strip = pixels[:, 0] if axis == 0 else pixels[0].transpose(-1, -2)
    band = strip.transpose(0, 1).flatten(1, 2)[:, small[axis] : large[axis], : large[1 - axis]]
    mean, std = (band.new_tensor(getattr(image.image_processor, name)) for name in ("image_mean", "image_std"))
    black = -mean.float() / std.float()
    # Zero, exactly, if the call did not normalise: no level of an image becomes that.
    return not band.any() or bool(((band.float() - black[:, None, None]).abs() < 0.01).all())
