"""One grid of an image that is shrunk if it is too large, and then padded at the right and the bottom to whole cells.

======  ============================================================================================================
option  meaning
======  ============================================================================================================
resize  the image processor's function for the resized size (Kimi-K2.5); without it the image fits into `size` (Fuyu)
merge   as for `merged_grid`, which gives the grid; without it each run of tokens is a row (Fuyu)
cell    as for `cells.cell_of`
======  ============================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from carve_kernels.hf import names
from carve_kernels.hf.layouts.boxes import covered
from carve_kernels.hf.layouts.cells import PATCH, cell_of, options_of, settings_of, sides
from carve_kernels.hf.layouts.merged_patches import check_patches, grid_of
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_seen, patches_of
from carve_kernels.hf.layouts.tiling import function_of
from carve_kernels.types import Size, View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The patch size, and the merge size if there is one."""
    options = options_of(config, processor)
    merge = {"image_processor.merge_size": options["merge"]} if "merge" in options else {}
    patch = PATCH if merge else cell_of(config, options)
    yield from settings_of(config, processor, {"image_processor.patch_size": patch, **merge})


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """One view, which reaches outside of the image where it was padded."""
    cell, resized = cell_of(image.config, image.options), _resized(image)
    rows, columns = (-(-length // side) for length, side in zip(resized, cell, strict=True))
    box = covered(image.size, resized, (rows, columns), cell)
    run = tokens.run()
    # A prompt that ends within the first row is truncated, which the number of tokens shows.
    found = grid_of(image) if "merge" in image.options else (rows, run if run < len(tokens) else columns)
    if found != (rows, columns):
        raise ValueError(
            f"inputs: expected a grid of {rows} x {columns}, which the settings of "
            f"{type(image.image_processor).__name__} make of an image of {image.size[0]} x {image.size[1]}, got "
            f"{found[0]} x {found[1]}; give settings to the image processor, not to a call, which hides the padding"
        )
    if "merge" in image.options:
        check_patches(image, found, box)
    else:
        check_seen(image, box, found, cell, patches_of(_patches(image, cell), found, (1, 1), raster=True))
    return (View(tokens.take(rows * columns), found, box),)


def _patches(image: ProcessedImage, cell: Size) -> torch.Tensor:
    """The patches of Fuyu from those of an image on: one for each image token, and a prompt has one image."""
    name = "pixel_values" if image.has("pixel_values") else "image_patches"
    # Those of transformers 5.12 are separate: a list of [1, patches, values], or one tensor of that shape.
    given = image.entry(name)
    separate = isinstance(given, list) or getattr(given, "ndim", 0) == 3
    patches: torch.Tensor = image.item(name).flatten(0, -2) if separate else image.entry(name, "[patches, values]")
    channels, values = image.config.num_channels, patches.shape[1]
    if values != channels * cell[0] * cell[1]:
        raise ValueError(
            f"inputs: expected {name} of {channels} channels of {cell[0]} x {cell[1]} pixels, as the model reads them, "
            f"got {values} numbers a patch; {type(image.image_processor).__name__} keeps the channels of an image: "
            'convert it first, with image.convert("RGB")'
        )
    if separate:
        return patches
    counts = (image.entry("input_ids") == names.image_id(image.config)).sum(1).tolist()
    return patches[sum([count for count in counts if count][: image.number]) :]


def _resized(image: ProcessedImage) -> Size:
    processor, (height, width) = image.image_processor, image.size
    if not processor.do_resize:
        return height, width
    if name := image.options.get("resize"):
        resize, patch, merge = function_of(processor, name), processor.patch_size, processor.merge_size
        resized: Size = resize(height, width, patch, merge, processor.max_patches, processor.size.max_height)[0]
        return resized
    largest = sides(processor.size)
    scale = min(largest[0] / height, largest[1] / width)
    # Truncated, not rounded, as the image processor does.
    return (int(height * scale), int(width * scale)) if scale < 1 else (height, width)
