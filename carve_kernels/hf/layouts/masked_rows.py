"""Rows of all crops together as far as a mask shows them, a newline behind each, then the whole canvas (Phi-4)."""

from __future__ import annotations

from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import Box, Size, View


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """The crops, which show an image at the top left of their canvas, a separator, and the canvas as a whole."""
    vision = image.config.vision_config
    crop = image.entry("image_pixel_values").shape[-1]
    if crop != vision.crop_size:
        raise ValueError(f"inputs: expected crops of {vision.crop_size} pixels as in the model's config, got {crop}")
    height, width = (int(side) for side in image.item("image_sizes", "[images, 2]"))
    crops = height // vision.crop_size, width // vision.crop_size
    mask = image.item("image_attention_mask", "[images, crops, rows, columns]")
    patches = mask.shape[-1]
    side = -(-patches // 2)
    seen = mask[1 : 1 + crops[0] * crops[1], ::2, ::2].unflatten(0, crops).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    kept = int(seen[:, 0].sum()), int(seen[0].sum())
    box = _box(image, (height, width))
    patch = vision.patch_size
    pixels = image.item("image_pixel_values", "[images, crops, 3, H, W]")[1 : 1 + crops[0] * crops[1]]
    check_pixels(image, box, (height // patch, width // patch), (patch, patch), pixels.unflatten(0, crops))
    cell = box[3] / (crops[0] * side), box[2] / (crops[1] * side)
    rows = tokens.take(kept[0] * (kept[1] + 1)).view(kept[0], kept[1] + 1)[:, :-1].flatten()
    tokens.take(1)
    whole = tokens.take(side * (side + 1)).view(side, side + 1)[:, :-1].flatten()
    crop_box = 0.0, 0.0, kept[1] * cell[1], kept[0] * cell[0]
    return View(rows, kept, crop_box, kind="tile"), View(whole, (side, side), box)


def _box(image: ProcessedImage, canvas: Size) -> Box:
    """The canvas in pixels of the image, which touches two of its sides."""
    (rows, columns), (height, width) = canvas, image.size
    if columns / width < rows / height:
        return 0.0, 0.0, float(width), rows * height / int(height * (columns / width))
    return 0.0, 0.0, columns * width / int(width * (rows / height)), float(height)
