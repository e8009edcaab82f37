"""Tiles in rows, then the whole image; a prompt shows only how many there are (InternVL, Aya Vision).

The option `between` matches the text between two tiles of an image, without it they are one run of tokens; `pages`
says that several images may be one run; `settings` has the attributes of the processor that must equal the config's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from carve_kernels.hf.layouts.cells import options_of, settings_of
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.tiling import (
    WHOLE,
    check_count,
    check_tiles,
    ended,
    function_of,
    grid_of,
    pattern_of,
    tile_view,
)
from carve_kernels.types import Size, View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """What the number of tokens of a tile depends on."""
    yield from settings_of(config, processor, options_of(config, processor).get("settings", {}))


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """A view of each tile and of the whole image, or of the image alone if there are no tiles."""
    grid, span = grid_of(image, image.before)
    parts = _parts(image, tokens, grid[0] * grid[1])
    check_count(image, len(parts))
    if image.has("num_patches") and int(image.item("num_patches")) != len(parts):
        raise ValueError(f"inputs: the prompt has {len(parts)} tiles, num_patches is {image.item('num_patches')}")
    tiles = _tiles(image, max(1, len(parts) - 1))
    places = [*((index // tiles[1] + 1, index % tiles[1] + 1) for index in range(len(parts) - 1)), WHOLE]
    check_tiles(image, image.box, places, tiles)
    return tuple(
        tile_view(image.box, place, tiles, part, grid, span) for place, part in zip(places, parts, strict=True)
    )


def _parts(image: ProcessedImage, tokens: Cursor, count: int) -> list[torch.Tensor]:
    """The tokens of each tile."""
    between = pattern_of(image, "between") if "between" in image.options else None
    parts: list[torch.Tensor] = []
    while run := tokens.run():
        if parts and (between is None or not re.fullmatch(between, "".join(tokens.between()))):
            break
        number = run // count
        if image.options.get("pages") and image.total > 1:
            own = image.item("num_patches") if image.has("num_patches") else None
            number = int(own or image.image_processor.get_number_of_image_patches(*image.size, {}))
        elif run % count:
            raise ValueError(
                f"inputs: the prompt has {run} image tokens in a run, expected a multiple of {count}, which is a tile; "
                "the prompt was probably truncated within the image, or the processor's settings are not the model's"
            )
        parts += [tokens.take(count) for _ in range(number)]
    if not parts:
        raise ended(image)
    return parts


def _tiles(image: ProcessedImage, number: int) -> Size:
    """The rows and columns of tiles, by the image processor's own function.

    Of all rows and columns within its limits it prefers one, which it then prefers of those with as many tiles, too:
    limits that were given for one call need not be known.
    """
    shape = function_of(image.image_processor, "get_optimal_tiled_canvas")
    tile = tuple(image.entry("pixel_values").shape[-2:])
    columns, rows = map(int, shape(image.size, tile, number, number))
    if rows * columns != number:
        raise ValueError(
            f"images: the prompt has {number} tiles, an image of {image.size[0]} x {image.size[1]} is never cut into "
            "as many; the prompt was probably truncated, or give the images of each row in the order of the prompt"
        )
    return rows, columns
