"""A grid of fixed size of the whole image, and one of each crop of a pan and scan (Gemma 3).

The options are those of `cells.cell_of`. The processor drops the number of crops, but its prompt announces them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

from carve_kernels.hf.layouts.cells import PATCH, attribute, cell_of, sides
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import Box, Size, View


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """The whole image, and then its crops along its long side."""
    pixels, cell = image.entry("pixel_values", "[images and crops, 3, H, W]"), cell_of(image.config, image.options)
    grid = pixels.shape[-2] // cell[0], pixels.shape[-1] // cell[1]
    count = grid[0] * grid[1]
    whole = View(tokens.take(count), grid, _pooled(image.box, pixels, grid, cell))
    patch = sides(attribute(image.config, PATCH))
    patches = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
    if image.before < len(pixels):
        check_pixels(image, _pooled(image.box, pixels, patches, patch), patches, patch, pixels[image.before])
    if image.has("num_crops"):
        crops = [tokens.take(count) for _ in range(int(image.item("num_crops")))]
    else:
        crops = [] if len(pixels) == image.total else list(_crops(image.processor, tokens, count))
    given = len(pixels) - image.before - 1
    if image.number == image.total - 1 and len(crops) != given:
        raise ValueError(
            f"inputs: pixel_values hold {given} crops of the last image, the prompt has {len(crops)}; it was probably "
            "truncated, or the images do not match the prompt"
        )
    boxes = [_pooled(box, pixels, grid, cell) for box in _boxes(image.size, len(crops))]
    return (whole, *(View(found, grid, box, kind="crop") for found, box in zip(crops, boxes, strict=True)))


def _crops(processor: Any, tokens: Cursor, count: int) -> Iterator[Any]:
    """The tokens of each crop: the prompt announces them behind the whole image, and has a mark between them."""
    sequence, edges = processor.full_image_sequence, (processor.boi_token, processor.tokenizer.eoi_token)
    _, announced, between, _ = processor.replace_image_token({"num_crops": [2]}, 0).split(sequence)
    before, after = sequence.split(edges[0])[0], sequence.split(edges[1])[-1]
    mark = f"{after}{announced}{before}"
    while tokens.taken < len(tokens) and _text(processor, tokens, edges) == mark:
        yield tokens.take(count)
        mark = f"{after}{between}{before}"


def _text(processor: Any, tokens: Cursor, edges: tuple[str, str]) -> str:
    """The text up to the next image token, without the tokens around an image."""
    text: str = processor.tokenizer.convert_tokens_to_string(tokens.between())
    return text.replace(edges[0], "").replace(edges[1], "")


def _pooled(box: Box, pixels: Any, grid: Size, cell: Size) -> Box:
    """The part of a box that whole cells cover: what remains of the patches is not pooled."""
    left, top, right, bottom = box
    shares = (grid[1] * cell[1] / pixels.shape[-1], grid[0] * cell[0] / pixels.shape[-2])
    return left, top, left + (right - left) * shares[0], top + (bottom - top) * shares[1]


def _boxes(size: Size, crops: int) -> list[Box]:
    """The boxes of crops in the order of the prompt; the last one ends with the image."""
    height, width = size
    step = ceil(max(size) / max(crops, 1))
    ends = [(step * number, min(step * (number + 1), max(size))) for number in range(crops)]
    if width >= height:
        return [(float(start), 0.0, float(end), float(height)) for start, end in ends]
    return [(0.0, float(start), float(width), float(end)) for start, end in ends]
