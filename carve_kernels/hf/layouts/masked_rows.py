"""Rows of all crops together as far as a mask shows them, a newline behind each, then the whole canvas (Phi-4)."""

from __future__ import annotations

from carve_kernels.hf.layouts.boxes import part, shrunk
from carve_kernels.hf.layouts.cells import PATCH, attribute, sides
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import Size, View


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """The crops, which show an image at the top left of their canvas, a separator, and the canvas as a whole."""
    size = image.config.vision_config.crop_size
    crop = image.entry("image_pixel_values").shape[-1]
    if crop != size:
        raise ValueError(f"inputs: expected crops of {size} pixels as in the model's config, got {crop}")
    height, width = image.item("image_sizes", "[images, 2]").tolist()
    crops = height // size, width // size
    mask = image.item("image_attention_mask", "[images, crops, rows, columns]")
    side = -(-mask.shape[-1] // 2)
    seen = mask[1 : 1 + crops[0] * crops[1], ::2, ::2].unflatten(0, crops).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    kept = int(seen[:, 0].sum()), int(seen[0].sum())
    whole = part(image.size, _resized(image.size, (height, width)), (0, 0), (height, width))
    patch = sides(attribute(image.config, PATCH))
    pixels = image.item("image_pixel_values", "[images, crops, 3, H, W]")[1 : 1 + crops[0] * crops[1]]
    check_pixels(image, whole, (height // patch[0], width // patch[1]), patch, pixels.unflatten(0, crops))
    box = shrunk(whole, kept[0] / (crops[0] * side), kept[1] / (crops[1] * side))
    rows = View(tokens.take_rows(*kept).flatten(), kept, box, kind="tile")
    tokens.take(1)
    return rows, View(tokens.take_rows(side, side).flatten(), (side, side), whole)


def _resized(size: Size, canvas: Size) -> Size:
    """The size of an image that touches two sides of its canvas."""
    down, across = canvas[0] / size[0], canvas[1] / size[1]
    # Truncated, not rounded, as the image processor does.
    return (int(size[0] * across), canvas[1]) if across < down else (canvas[0], int(size[1] * down))
