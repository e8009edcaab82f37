"""A grid of fixed size of the whole image, and one of each crop of a pan and scan (Gemma 3).

The options are those of `cells.cell_of`. The processor drops the number of crops, but its prompt announces them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

from carve_kernels.hf.layouts.boxes import covered, shrunk
from carve_kernels.hf.layouts.cells import PATCH, attribute, cell_of, sides
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels
from carve_kernels.types import Box, Size, View


def views(image: ProcessedImage, tokens: Cursor) -> tuple[View, ...]:
    """The whole image, and then its crops along its long side."""
    pixels, cell = image.entry("pixel_values", "[images and crops, 3, H, W]"), cell_of(image.config, image.options)
    height, width = pixels.shape[-2:]
    grid = height // cell[0], width // cell[1]
    count = grid[0] * grid[1]
    # Patches that make no whole cell are not pooled.
    shares = grid[0] * cell[0] / height, grid[1] * cell[1] / width
    whole = View(tokens.take(count), grid, shrunk(image.box, *shares))
    if image.before < len(pixels):
        patch = sides(attribute(image.config, PATCH))
        patches = height // patch[0], width // patch[1]
        box = covered(image.size, (height, width), patches, patch)
        check_pixels(image, box, patches, patch, pixels[image.before])
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
    boxes = [shrunk(box, *shares) for box in _boxes(image.size, len(crops))]
    return (whole, *(View(found, grid, box, kind="crop") for found, box in zip(crops, boxes, strict=True)))


def _crops(processor: Any, tokens: Cursor, count: int) -> Iterator[Any]:
    """The tokens of each crop: the prompt announces them behind the whole image, and has a mark between them."""
    sequence, edges = processor.full_image_sequence, (processor.boi_token, processor.tokenizer.eoi_token)
    _, announced, between, _ = _of_two_crops(processor).split(sequence)
    before, after = sequence.split(edges[0])[0], sequence.split(edges[1])[-1]
    mark = f"{after}{announced}{before}"
    while tokens.taken < len(tokens) and _text(processor, tokens, edges) == mark:
        yield tokens.take(count)
        mark = f"{after}{between}{before}"


def _of_two_crops(processor: Any) -> str:
    """What replaces an image of two crops in a prompt."""
    try:
        written: str = processor.replace_image_token({"num_crops": [2]}, 0)
    except NotImplementedError:
        # The processor of transformers 5.12 writes it within its call.
        whole = processor.full_image_sequence
        written = f"Here is the original image {whole} and here are some crops to help you see better {whole} {whole}"
    return written


def _text(processor: Any, tokens: Cursor, edges: tuple[str, str]) -> str:
    """The text up to the next image token, without the tokens around an image."""
    text: str = processor.tokenizer.convert_tokens_to_string(tokens.between())
    return text.replace(edges[0], "").replace(edges[1], "")


def _boxes(size: Size, crops: int) -> list[Box]:
    """The boxes of crops in the order of the prompt; the last one ends with the image."""
    height, width = size
    step = ceil(max(size) / max(crops, 1))
    ends = [(step * number, min(step * (number + 1), max(size))) for number in range(crops)]
    if width >= height:
        return [(float(start), 0.0, float(end), float(height)) for start, end in ends]
    return [(0.0, float(start), float(width), float(end)) for start, end in ends]
