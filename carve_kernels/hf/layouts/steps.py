"""Images that are resized more than once before they are cut into tiles (Idefics3, SmolVLM)."""

from __future__ import annotations

import numpy as np

from carve_kernels.hf.layouts.cells import sides
from carve_kernels.hf.layouts.processed_image import ProcessedImage
from carve_kernels.hf.layouts.seen import Resize
from carve_kernels.hf.layouts.tiling import function_of
from carve_kernels.types import Size

# Up to how many sides of a tile the longest side of an image without tiles may have been.
_MULTIPLES = 6
# From which enlargement of one side on the longest side must be known, and how many of its lengths are tried.
_ENLARGED, _LENGTHS = 1.5, 16


def steps_of(image: ProcessedImage, tiles: Size) -> Resize | None:
    """The sizes to which the whole image may be resized before it is resized to its tiles; None if that is open.

    The longest side is a multiple of a tile's, which the tiles of a prompt tell if there are several.
    """
    side, size = image.entry("pixel_values").shape[-1], image.image_processor.size
    longest = [side * max(tiles)] if tiles != (1, 1) else [side * number for number in range(1, _MULTIPLES + 1)]
    function = function_of(image.image_processor, "get_resize_output_image_size")
    blank = np.broadcast_to(np.uint8(0), (3, *image.size))
    first = [function(blank, length) for length in longest]
    if "height" in size:
        return Resize([[sides(size)], *([each] for each in first), []])
    # Of an image that is much enlarged along one side, little remains that does not depend on the length. If a call was
    # given it, it need not be a multiple; the tiles of the prompt must be those of one that it can be.
    if (
        tiles != (1, 1)
        and max(count * side / length for count, length in zip(tiles, first[0], strict=True)) > _ENLARGED
    ):
        lengths = range(longest[0] - side + 1, longest[0] + 1, max(1, side // _LENGTHS))
        found = {_tiles(image, length) for length in lengths}
        if tiles in found and _tiles(image, dict(size)["longest_edge"]) != tiles:
            return None
    return Resize([[function(blank, dict(size)["longest_edge"])], *([each] for each in first), []])


def _tiles(image: ProcessedImage, longest: int) -> Size:
    """The rows and columns of tiles of an image, by the image processor, with a longest side."""
    settings = {"do_image_splitting": True, "size": {"longest_edge": longest}}
    _, rows, columns = image.image_processor.get_number_of_image_patches(*image.size, settings)
    return int(rows), int(columns)
