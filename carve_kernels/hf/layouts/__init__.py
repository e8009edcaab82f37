"""Where the visual tokens of a batch are, and which part of which image each one covers.

There is a module for each kind of layout, that is for each way in which processors lay out an image's tokens.
`names.FAMILIES` lists the kind of each model type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from carve_kernels.checks import describe
from carve_kernels.checks import size as check_size
from carve_kernels.hf import names
from carve_kernels.hf.layouts import centre_crop, merged_grid
from carve_kernels.hf.model import check_decoder, unwrap
from carve_kernels.ops.zoom import refuse_turned
from carve_kernels.types import Size, View, VisualLayout


class Kind(Protocol):
    """What the module of a kind of layout provides.

    `ENTRY` is the entry of the processor's output with one item per image, and `SHAPE` its shape. `settings` yields
    (name, found, expected) for each setting of the processor that must agree with the model's config. `views` returns,
    for each image, how many tokens it has in the prompt and its views, with tokens counted from the image's first.
    `canvas` returns the smallest canvas of an image that the processor does not crop, as (size, top, left).
    """

    ENTRY: str
    SHAPE: str

    def settings(self, config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]: ...

    def views(
        self, config: Any, processor: Any, entry: torch.Tensor, sizes: list[Size]
    ) -> list[tuple[int, tuple[View, ...]]]: ...

    def canvas(self, config: Any, processor: Any, size: Size) -> tuple[Size, int, int]: ...


KINDS: dict[str, Kind] = {"centre_crop": centre_crop, "merged_grid": merged_grid}


def layout_of(model: nn.Module, processor: Any, inputs: Any, images: Any) -> VisualLayout:
    """Find the visual tokens of a batch, their grids and boxes, from the output of the processor.

    ======  ==========================================================================================
    name    meaning
    ======  ==========================================================================================
    inputs  output of the processor: input_ids int [B, S] and the entries of its images
    images  a list of images for each row of the batch; or a flat list, for one image a row or one row.
            An image is the PIL image that the processor was given, or its (height, width)
    ======  ==========================================================================================

    Boxes are in pixels of these images, and reach outside of an image where the processor padded it.

    Raises ValueError if the family is not supported, the processor's settings do not fit the model, there is no image
    in the prompt, the images do not match the prompt, the image tokens do not fit the grid, or an image has an EXIF
    orientation, since whether the processor applied it depends on how it was called.
    """
    check_decoder(model)
    config = unwrap(model).config
    kind = check_processor(model, processor)
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError("inputs: expected images, got a video, which has no layout yet")
    is_image = inputs["input_ids"] == names.image_id(config)
    if not is_image.any():
        raise ValueError("inputs: found no image token in the prompt; build it with an image, as `build_prompt` does")
    sizes = _sizes_by_row(images, len(is_image))
    flat = [size for row in sizes for size in row]
    parts = iter(kind.views(config, processor, _entry(inputs, kind, len(flat)), flat))
    views = tuple(
        _place(number, row.nonzero().flatten().to(torch.int32).cpu(), list(islice(parts, len(sizes[number]))))
        for number, row in enumerate(is_image)
    )
    return VisualLayout(views, sizes)


def check_processor(model: nn.Module, processor: Any) -> Kind:
    """The kind of layout of a model. Raises ValueError if there is none, or if the processor does not fit the model."""
    config = unwrap(model).config
    if config.model_type not in names.FAMILIES:
        raise ValueError(f"model: expected a model_type of {names.supported()}, got {config.model_type!r}")
    kind = KINDS[names.FAMILIES[config.model_type]]
    token, expected = names.image_id(processor), names.image_id(config)
    if token not in (None, expected):
        raise ValueError(
            f"processor: its image token has the id {token}, expected {expected} as in the model's config; "
            "load the model's own tokenizer"
        )
    for name, setting, required in kind.settings(config, processor):
        if setting != required:
            raise ValueError(
                f"processor: {name} is {setting!r}, expected {required!r} as in the model's config; "
                f"set processor.{name} = {required!r}, or write it into the processor's file in the checkpoint"
            )
    return kind


def canvas_of(model: nn.Module, processor: Any, size: Size) -> tuple[Size, int, int]:
    """The smallest canvas of an image that is not cropped, as (size, top, left). Raises ValueError if there is none."""
    return check_processor(model, processor).canvas(unwrap(model).config, processor, size)


def _entry(inputs: Any, kind: Kind, images: int) -> torch.Tensor:
    """An entry of the processor's output with one item per image."""
    entry: torch.Tensor | None = inputs.get(kind.ENTRY)
    if entry is None:
        returned = ", ".join(sorted(inputs)) or "nothing"
        raise ValueError(f"inputs: expected {kind.ENTRY!r} from the processor, got {returned}")
    if entry.ndim != kind.SHAPE.count(",") + 1:
        raise ValueError(f"inputs: expected {kind.ENTRY} of shape {kind.SHAPE}, got {list(entry.shape)}")
    if len(entry) != images:
        raise ValueError(
            f"images: the inputs hold {len(entry)} image(s), got {images}; give every image of the prompts in order, "
            "one list a row, and select views afterwards by `view.image`"
        )
    return entry


def _place(row: int, positions: torch.Tensor, images: list[tuple[int, tuple[View, ...]]]) -> tuple[View, ...]:
    """The views of a row's images, with tokens as positions in the sequence."""
    lengths = [length for length, _ in images]
    if sum(lengths) != len(positions):
        runs = int((positions.diff() > 1).sum()) + 1 if len(positions) else 0
        if runs != len(images):
            raise ValueError(
                f"images: row {row} has {runs} image(s) in its prompt, got {len(images)}; give the images of each "
                "row as its own list, in the order of the prompt"
            )
        grids = " and ".join(f"{view.grid[0]} x {view.grid[1]}" for _, views in images for view in views)
        raise ValueError(
            f"inputs: row {row} has {len(positions)} image tokens, its grid of {grids} needs {sum(lengths)}; "
            "the prompt was probably truncated within the image"
        )
    runs_of_images = positions.split(lengths)
    return tuple(
        replace(view, tokens=tokens[view.tokens], image=image)
        for image, ((_, views), tokens) in enumerate(zip(images, runs_of_images, strict=True))
        for view in views
    )


def _sizes_by_row(images: Any, rows: int) -> tuple[tuple[Size, ...], ...]:
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
