"""The whole image, then rows of all tiles together without their padding, a newline behind each (LLaVA-NeXT).

An image keeps its shape on the canvas of its tiles, and the model drops rows or columns of padding, whole ones only.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate, product
from typing import Any

from carve_kernels.hf.layouts.anyres import canvas_size, limited, part_of_canvas, runs_of, tiles_of, unpadded
from carve_kernels.hf.layouts.boxes import part
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.hf.layouts.towers import tower_settings
from carve_kernels.types import View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The canvases, the side of a tile, and what the number of tokens depends on."""
    image_processor, vision = processor.image_processor, config.vision_config
    found, expected = (
        [list(map(int, canvas)) for canvas in owner.image_grid_pinpoints] for owner in (image_processor, config)
    )
    yield "image_processor.image_grid_pinpoints", found, expected
    for name, length in dict(image_processor.size).items():
        yield f"image_processor.size[{name!r}]", length, vision.image_size
    for name in ("downsample_rate", "vision_aspect_ratio"):
        if hasattr(config, name) and hasattr(processor, name):
            yield name, getattr(processor, name), getattr(config, name)
    yield from tower_settings(config, processor)
    if hasattr(processor, "num_image_tokens"):
        yield "num_image_tokens", processor.num_image_tokens, (vision.image_size // vision.patch_size) ** 2


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """The whole image and the rows over its tiles; the former alone where a prompt has several images (OneVision)."""
    vision, size = image.config.vision_config, image.size
    pixels, tile = tiles_of(image), vision.image_size
    rate = Fraction(getattr(image.config, "downsample_rate", None) or 1)
    side, cell = int(tile // vision.patch_size * rate), int(vision.patch_size / rate)
    grid, cells = (side, side), (cell, cell)
    several = _is_one_of_several(image)
    # Pixels at the right and the bottom that make no whole patch have no token.
    end = side * cell
    box = part(size, (tile, tile), (0, 0), (end, end), (max(size), max(size)) if several else size)
    base = View(tokens.take(side * side), grid, box)
    # A size and a crop that are given to a call are not known.
    check_pixels(image, box, grid, cells, pixels[0], samples=4)
    if several:
        tokens.take(1)
        return (base,)
    canvas = canvas_size(image, pixels)
    rows, columns = canvas[0] // tile, canvas[1] // tile
    last = (rows - 1) * tile, (columns - 1) * tile
    box = part_of_canvas(image, canvas, last, (last[0] + end, last[1] + end))
    check_pixels(image, box, grid, cells, pixels[rows * columns], samples=4)
    first, kept = unpadded(size, (rows * side, columns * side))
    visible = limited(image.config, kept, side)
    found = tokens.take_rows(*visible)
    # Nothing is kept of an image that is thinner than a patch of its canvas.
    if not found.numel():
        return (base,)
    down, across = (list(runs_of(*span, side, cell, tile)) for span in zip(first, kept, visible, strict=True))
    views = [base]
    for (selected, top, bottom), (chosen, left, right) in product(down, across):
        here = found[selected, chosen]
        box = part_of_canvas(image, canvas, (top, left), (bottom, right))
        views.append(View(here.flatten(), (here.shape[0], here.shape[1]), box, kind="tile"))
    return tuple(views)


def _is_one_of_several(image: ProcessedImage) -> bool:
    """Whether the image is one of several of a prompt, by the numbers of images that the processor returned."""
    if not image.has("batch_num_images"):
        return False
    counts = list(map(int, image.entry("batch_num_images")))
    return next(count for count, end in zip(counts, accumulate(counts), strict=True) if image.number < end) > 1
