"""The patches of `image_grid_thw`, several of which the model merges to a token."""

from __future__ import annotations

from carve_kernels.hf.layouts.cells import PATCH, attribute, merged, sides
from carve_kernels.hf.layouts.processed_image import ProcessedImage
from carve_kernels.hf.layouts.seen import check_seen, patches_of
from carve_kernels.types import Box, Size

MERGE = "vision_config.spatial_merge_size"


def grid_of(image: ProcessedImage) -> Size:
    """The grid of merged patches. Raises ValueError if the patches do not have the model's size or cannot be merged."""
    frames, *patches = image.item("image_grid_thw", "[images, 3]").tolist()
    if frames != 1:
        raise ValueError(f"inputs: expected image_grid_thw of one frame an image, got {frames}")
    pixels, (height, width) = image.entries.get("pixel_values"), sides(attribute(image.config, PATCH))
    if pixels is not None and pixels[0].numel() % (3 * height * width):
        raise ValueError(
            f"inputs: expected pixel_values of patches of {height} x {width} pixels, as in the model's config, got "
            f"{pixels[0].numel()} numbers a patch"
        )
    return merged("image_grid_thw", patches, merge_of(image))


def check_patches(image: ProcessedImage, grid: Size, box: Box) -> None:
    """Raise ValueError if the patches do not show the image in a box, or not in the order that the model merges."""
    if not image.has("pixel_values"):
        return
    start = int(image.entry("image_grid_thw")[: image.number].prod(1).sum())
    merge, patch = merge_of(image), sides(attribute(image.config, PATCH))
    seen = patches_of(image.entry("pixel_values")[start:], grid, merge, bool(image.options.get("raster")))
    check_seen(image, box, grid, (merge[0] * patch[0], merge[1] * patch[1]), seen)


def merge_of(image: ProcessedImage) -> Size:
    """How many patches become a token, as (rows, columns)."""
    entry = image.options.get("entry")
    return sides(int(image.item(entry)) if entry else attribute(image.config, image.options.get("merge", MERGE)))
