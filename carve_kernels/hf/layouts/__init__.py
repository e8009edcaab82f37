"""Where the visual tokens of a batch are, and which part of which image each one covers.

There is a module for each kind of layout, that is for each way in which processors lay out an image's tokens.
`hf.families.FAMILIES` lists the kind of each model type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from carve_kernels.checks import describe
from carve_kernels.checks import size as check_size
from carve_kernels.hf import names, processors
from carve_kernels.hf.families import Family, family_of, supported
from carve_kernels.hf.layouts.kinds import check_settings, kind_of
from carve_kernels.hf.layouts.measured import measured_layout
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.rows import by_row
from carve_kernels.hf.layouts.videos import has_images, video_layout
from carve_kernels.hf.model import check_decoder, unwrap
from carve_kernels.ops.zoom import refuse_turned
from carve_kernels.types import Size, View, VisualLayout

_EACH = "give the images of each row as its own list, in the order of the prompt"


def layout_of(model: nn.Module, processor: Any, inputs: Any, images: Any = None, videos: Any = None) -> VisualLayout:
    """Find the visual tokens of a batch, their grids and boxes, from the output of the processor.

    ======  ==========================================================================================
    name    meaning
    ======  ==========================================================================================
    inputs  output of the processor: input_ids int [B, S] and the entries of its images
    images  a list of images for each row of the batch; or a flat list, for one image a row or one row.
            An image is the PIL image that the processor was given, or its (height, width)
    videos  the same for videos: a `Video`, a list of the frames that the processor was given, or (frames,
            height, width). None = there is none
    ======  ==========================================================================================

    A few cells of an image are compared with the pixels of the inputs, so that another order of the images, or another
    image, is refused. Nothing can be compared with a (height, width): of images whose tokens are equally many, their
    order is not checked then, nor is that of images of families that are not listed, or of videos whose frames the
    processor chose.

    Boxes are in pixels of these images, and reach outside of an image where the processor padded it. The layout of a
    family that is not listed is measured, see `layouts.measured`.

    Raises ValueError if the family's image tokens have no place in an image, the processor's settings do not fit the
    model, there is no image in the prompt, the images do not match the prompt, the image tokens do not fit the grid, or
    an image has an EXIF orientation, since whether the processor applied it depends on how it was called.
    """
    check_decoder(model)
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise TypeError(f"inputs: expected the output of the processor, with input_ids, got {describe(inputs)}")
    config = unwrap(model).config
    if videos is not None:
        alone = not has_images(images)
        located = video_layout(config, processor, inputs, videos, alone=alone)
        if alone:
            return located.layout()
        return located.beside(layout_of(model, processor, located.without_videos(inputs), images))
    family = check_processor(model, processor)
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError("videos: expected the videos of the prompt, got None and inputs of a video")
    ids = inputs["input_ids"]
    is_image = ids == names.image_id(config)
    if not is_image.any():
        raise ValueError("inputs: found no image token in the prompt; build it with an image, as `build_prompt` does")
    of_rows = by_row("images", images, len(is_image), _is_image)
    for row, (of_row, here) in enumerate(zip(of_rows, is_image, strict=True)):
        if not of_row and bool(here.any()):
            raise ValueError(
                f"images: row {row} has {int(here.sum())} image tokens in its prompt, got no image; {_EACH}"
            )
    sizes = tuple(tuple(_size(image) for image in row) for row in of_rows)
    if family is None:
        return measured_layout(model, processor, inputs, sizes)
    kind, total = kind_of(family), sum(map(len, sizes))
    views: list[tuple[View, ...]] = []
    number = before = 0
    for row, of_row in enumerate(of_rows):
        cursor = Cursor(ids[row], is_image[row], getattr(processor, "tokenizer", processor))
        found: list[View] = []
        for index, given in enumerate(of_row):
            original = given if isinstance(given, Image.Image) else None
            size = sizes[row][index]
            image = ProcessedImage(config, processor, inputs, family.options, size, number, total, before, original)
            if index and cursor.taken >= len(cursor):
                raise ValueError(
                    f"images: the prompt of row {row} ends before image {index + 1} of {len(of_row)}; it was probably "
                    f"truncated, or {_EACH}"
                )
            of_image = kind.views(image, cursor)
            found += [replace(view, image=index) for view in of_image]
            number, before = number + 1, before + len(of_image)
        _check_row(row, cursor, found, len(of_row))
        views.append(tuple(found))
    return VisualLayout(tuple(views), sizes)


def check_processor(model: nn.Module, processor: Any) -> Family | None:
    """The family of a model; None for one that is not listed.

    Raises TypeError for what is no processor, ValueError if the family's image tokens have no place, or if the
    processor does not fit the model.
    """
    config = unwrap(model).config
    family = family_of(config.model_type, processor)
    if family is None and names.image_id(config) is None:
        raise ValueError(
            f"model: the config of {config.model_type!r} names no image token, so its layout cannot be measured; "
            f"known are {supported()}"
        )
    if family is not None and family.reason is not None:
        raise ValueError(f"model: the image tokens of {config.model_type} have no place in the image: {family.reason}")
    processors.check(processor)
    if family is None:
        return None
    token, expected = None if family.placeholder else names.image_id(processor), names.image_id(config)
    if token not in (None, expected):
        raise ValueError(
            f"processor: its image token has the id {token}, expected {expected} as in the model's config; "
            "load the model's own tokenizer"
        )
    check_settings(family, config, processor)
    return family


def canvas_of(model: nn.Module, processor: Any, size: Size) -> tuple[Size, int, int]:
    """The smallest canvas of an image that is not cropped, as (size, top, left). Raises ValueError if there is none."""
    family = check_processor(model, processor)
    if family is None:
        raise ValueError(
            f"fit: expected None, got 'pad': what a processor of {unwrap(model).config.model_type!r} crops is unknown, "
            f"known are {supported()}"
        )
    canvas = getattr(kind_of(family), "canvas", None)
    found: tuple[Size, int, int] = canvas(unwrap(model).config, processor, size) if canvas else (size, 0, 0)
    return found


def _check_row(row: int, cursor: Cursor, views: list[View], images: int) -> None:
    """Raise ValueError if the image tokens of a row are not those that its images need."""
    if cursor.taken == len(cursor):
        return
    # One image may have several runs of tokens, but not fewer than one.
    if cursor.runs < images or (cursor.taken < len(cursor) and cursor.runs > len(views) == images):
        raise ValueError(f"images: row {row} has {cursor.runs} image(s) in its prompt, got {images}; {_EACH}")
    grids = " and ".join(f"{view.grid[0]} x {view.grid[1]}" for view in views)
    cut, other = "the prompt was probably truncated within the image", "the processor's settings are not the model's"
    raise ValueError(
        f"inputs: row {row} has {len(cursor)} image tokens, its grid of {grids} needs {cursor.taken}; "
        + (cut if len(cursor) < cursor.taken else f"probably {other}")
    )


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (
        isinstance(value, (tuple, torch.Size)) and len(value) == 2 and all(isinstance(side, int) for side in value)
    )


def _size(image: Any) -> Size:
    if not isinstance(image, Image.Image):
        return check_size("images", image)
    refuse_turned("images", image)
    return image.height, image.width
