"""Layouts measured through a model's own processor and vision tower, with no knowledge of its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from carve_kernels.checks import size as check_size
from carve_kernels.hf import names
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.layouts.coordinates import Entries, coordinates
from carve_kernels.hf.layouts.influence import SEVERAL, Influence, influence
from carve_kernels.hf.layouts.token_boxes import boxes_of
from carve_kernels.hf.model import check_decoder, unwrap
from carve_kernels.types import Size

# More than this share of values that reach several tokens is no accident of a gradient.
_MIXED = 0.01


@dataclass(frozen=True)
class Measured:
    """Where each image token of a batch lies.

    ======  =======  =======  ============================================================================
    name    dtype    shape    meaning
    ======  =======  =======  ============================================================================
    boxes   float64  [N, 4]   the box of each image token in pixels of its image, NaN where it shows none
    images  int64    [N]      the number of its image, over all rows, -1 where it shows none
    tokens  int64    [N, 2]   row and column of each image token in the prompt
    ======  =======  =======  ============================================================================
    """

    boxes: torch.Tensor
    images: torch.Tensor
    tokens: torch.Tensor


def measure(
    model: nn.Module,
    processor: Any,
    size: Size,
    *,
    settings: Mapping[str, Any] | None = None,
    prompt: str | None = None,
) -> Measured:
    """Measure the box of every image token of one image of `size` (height, width).

    ========  =============================================================================================
    name      meaning
    ========  =============================================================================================
    settings  arguments of the processor, such as images_kwargs
    prompt    the prompt with one image; None: as `build_prompt` has it
    ========  =============================================================================================

    Raises ValueError if the model's tokens have no place in the image, or none that can be measured.
    """
    check_decoder(model)
    prompts = [build_prompt(processor, "x", 1) if prompt is None else prompt]
    return measure_batch(model, processor, None, ((check_size("size", size),),), prompts, settings or {})


def measure_batch(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Any] | None,
    sizes: Sequence[Sequence[Size]],
    prompts: Sequence[str],
    settings: Mapping[str, Any],
) -> Measured:
    """Measure a batch whose rows have images of these sizes; `inputs` are its own, None: those of the prompts."""
    first: list[Mapping[str, Any]] = []

    def process(images: list[Image.Image]) -> Entries:
        rest = iter(images)
        rows = [[next(rest) for _ in row] for row in sizes]
        given = rows[0] if len(rows) == 1 else rows
        padding = {"padding": True} if len(rows) > 1 else {}
        output = processor(images=given, text=list(prompts), return_tensors="pt", **padding, **settings)
        first.append(output)
        shape = output["input_ids"].shape
        return {name: value for name, value in output.items() if not _is_text(name, value, shape)}

    pixels, origin = coordinates(process, [size for row in sizes for size in row])
    if inputs is None:
        inputs = first[0]
    else:
        _check_same(inputs, pixels.entries, {path[0] for path in pixels.leaves})
    noise = torch.randn(len(origin.image), generator=torch.Generator().manual_seed(0))
    filling = torch.where(origin.image >= 0, noise, pixels.values(pixels.entries))
    parts = filling.split([tensor.numel() for tensor in pixels.tensors()])
    tensors = [part.view(tensor.shape) for part, tensor in zip(parts, pixels.tensors(), strict=True)]
    with influence(model, inputs, tensors, pixels.filled) as reached:
        owners = reached.tokens()
        _refuse_mixing(unwrap(model).config.model_type, owners, reached)
        boxes, images = boxes_of(owners, origin, len(reached.columns))
        return Measured(boxes, images, reached.columns)


def _is_text(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether an entry belongs to the text: by its name, or since it has a value for each token."""
    return names.is_text(name) or (isinstance(value, torch.Tensor) and value.shape[:2] == shape)


def _check_same(inputs: Mapping[str, Any], entries: Entries, pixels: set[Any]) -> None:
    """Raise ValueError if inputs were made from other images, or with other settings."""
    for name, expected in entries.items():
        got = inputs.get(name)
        if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
            continue
        if got.shape != expected.shape or (name not in pixels and not torch.equal(got.cpu(), expected)):
            raise ValueError(
                f"inputs: {name} is not what the processor makes of images of these sizes ({list(got.shape)}, expected "
                f"{list(expected.shape)}); the layout of this family is measured with the processor's own settings, so "
                "set them on the processor instead of passing them to a call"
            )


def _refuse_mixing(model_type: str, owners: torch.Tensor, reached: Influence) -> None:
    mixed = int((owners == SEVERAL).sum())
    if mixed > _MIXED * len(owners):
        raise ValueError(
            f"model: the image tokens of {model_type!r} have no place in the image: each is computed from all of it, "
            "as by learned queries"
        )
