"""Where the visual tokens of a batch are, and which part of which image each one shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import nn

from carve_kernels.checks import describe
from carve_kernels.checks import size as check_size
from carve_kernels.hf import names
from carve_kernels.hf.layouts import centre_crop, merged_grid
from carve_kernels.hf.layouts.placing import Canvas, Kind, Placing
from carve_kernels.hf.model import check_decoder, unwrap
from carve_kernels.ops.zoom import refuse_turned
from carve_kernels.types import Size, View, VisualLayout

FAMILIES: dict[str, Kind] = {
    "llava": centre_crop.KIND,
    "qwen2_vl": merged_grid.KIND,
    "qwen2_5_vl": merged_grid.KIND,
}


def layout_of(model: nn.Module, processor: Any, inputs: Any, images: Any) -> VisualLayout:
    """Find the visual tokens of a batch: positions, grids and boxes, from what the processor returned.

    ======  ==========================================================================================
    name    meaning
    ======  ==========================================================================================
    inputs  what the processor returned: input_ids int [B, S] and the entries of its images
    images  a list of images for each row of the batch; or a flat list, for one image a row or one row.
            An image is the PIL image that the processor was given, or its (height, width)
    ======  ==========================================================================================

    A box is in pixels of that picture, and reaches outside of it where the processor padded it.

    Raises ValueError if the family is not supported, the processor's settings do not fit the model, no image is in the
    prompt, the images do not match the prompt, the image tokens do not fit the grid, or an image has an EXIF
    orientation: whether the processor turned it depends on how it was called.
    """
    check_decoder(model)
    config = unwrap(model).config
    kind = check_processor(model, processor)
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError("inputs: expected images, got a video, which has no layout yet")
    marks = inputs["input_ids"] == names.image_id(config)
    if not marks.any():
        raise ValueError("inputs: found no image token in the prompt; build it with an image, as `build_prompt` does")
    sizes = _by_row(images, len(marks))
    placings = iter(kind.place(config, processor, inputs, [size for row in sizes for size in row]))
    views = tuple(
        _views(number, row.nonzero().flatten().to(torch.int32).cpu(), list(islice(placings, len(sizes[number]))))
        for number, row in enumerate(marks)
    )
    return VisualLayout(views, sizes)


def check_processor(model: nn.Module, processor: Any) -> Kind:
    """The kind of layout of a model, whose processor puts as many tokens into a prompt as the model makes.

    Raises ValueError for a family that is not supported, and for a setting of the processor that does not fit.
    """
    config = unwrap(model).config
    kind = FAMILIES.get(config.model_type)
    if kind is None:
        raise ValueError(f"model: expected a model_type of {supported()}, got {config.model_type!r}")
    found, expected = names.image_id(processor), names.image_id(config)
    if found not in (None, expected):
        raise ValueError(
            f"processor: its image token has the id {found}, expected {expected} as in the model's config; "
            "load the tokenizer that belongs to the model"
        )
    kind.check(config, processor)
    return kind


def canvas_of(model: nn.Module, processor: Any, size: Size) -> Canvas:
    """The smallest canvas for an image of (height, width) that the processor shows whole.

    Raises ValueError if there is none.
    """
    return check_processor(model, processor).canvas(unwrap(model).config, processor, size)


def supported() -> str:
    """The supported families, for a message."""
    return ", ".join(sorted(FAMILIES))


def _views(row: int, positions: torch.Tensor, placings: list[Placing]) -> tuple[View, ...]:
    lengths = [placing.length for placing in placings]
    if sum(lengths) != len(positions):
        runs = int((positions.diff() > 1).sum()) + 1 if len(positions) else 0
        if runs != len(placings):
            raise ValueError(
                f"images: row {row} has {runs} image(s) in its prompt, got {len(placings)}; give the images of each "
                "row as a list of its own, in the order of the prompt"
            )
        grids = " and ".join(f"{part.grid[0]} x {part.grid[1]}" for placing in placings for part in placing.parts)
        raise ValueError(
            f"inputs: row {row} has {len(positions)} image tokens, its grid of {grids} needs {sum(lengths)}; "
            "the prompt was probably truncated within the image"
        )
    views = []
    for image, (placing, own) in enumerate(zip(placings, positions.split(lengths), strict=True)):
        views += [View(own[part.columns], part.grid, part.box, image, kind=part.kind) for part in placing.parts]
    return tuple(views)


def _by_row(images: Any, rows: int) -> tuple[tuple[Size, ...], ...]:
    if _is_image(images):
        images = [images]
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise TypeError(f"images: expected a list of images or of lists of images, got {describe(images)}")
    nested = [[image] for image in images] if all(_is_image(image) for image in images) else list(images)
    if rows == 1 and len(nested) > 1:
        nested = [[image for row in nested for image in row]]
    if len(nested) != rows:
        raise ValueError(
            f"images: expected a list for each of the {rows} row(s) of the batch, got {len(nested)}; give one list of "
            "images a row, in the order of the prompt"
        )
    return tuple(tuple(_size(image) for image in row) for row in nested)


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (
        isinstance(value, (tuple, torch.Size)) and len(value) == 2 and all(isinstance(side, int) for side in value)
    )


def _size(image: Any) -> Size:
    if not isinstance(image, Image.Image):
        return check_size("images", image)
    refuse_turned("images", image)
    return image.height, image.width
