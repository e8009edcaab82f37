"""Layouts measured through a model's own processor and vision tower, with no knowledge of its family.

The processor says where each pixel value comes from (`coordinates`), the tower which token it reaches (`influence`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import nn

from carve_kernels.checks import size as check_size
from carve_kernels.hf import names
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.layouts.coordinates import Entries, Pixels, coordinates
from carve_kernels.hf.layouts.influence import SEVERAL, influence
from carve_kernels.hf.layouts.token_boxes import boxes_of, shared_boxes
from carve_kernels.hf.model import check_decoder, unwrap
from carve_kernels.types import Box, Size, View, VisualLayout

_LOG = logging.getLogger("carve_kernels")
# Fewer values than this share that reach several tokens are accidents of a gradient.
_MIXED = 0.01
# Of a cell's side: how far boxes that meet may lie apart.
_MEET = 0.1
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Measured:
    """Where each image token of a batch lies.

    ======  =======  =======  ============================================================================
    name    dtype    shape    meaning
    ======  =======  =======  ============================================================================
    boxes   float64  [N, 4]   the box of each image token in pixels of its image, NaN where it shows none
    images  int64    [N]      the number of its image in its row, -1 where it shows none
    tokens  int64    [N, 2]   row and column of each image token in the prompt
    sizes            by row   the (height, width) of each image
    ======  =======  =======  ============================================================================
    """

    boxes: torch.Tensor
    images: torch.Tensor
    tokens: torch.Tensor
    sizes: tuple[tuple[Size, ...], ...]


class _Known(NamedTuple):
    """A measurement, and the processor's entries that it holds for."""

    measured: Measured
    pixels: Pixels


_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, _Known]] = WeakKeyDictionary()


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
    return _measure(model, processor, ((check_size("size", size),),), prompts, settings or {}).measured


def measured_layout(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Any],
    sizes: tuple[tuple[Size, ...], ...],
    settings: Mapping[str, Any] | None = None,
) -> VisualLayout:
    """The layout of a batch of any family; `sizes` has the (height, width) of the images of each row.

    It is measured once for each model, settings of the processor and sizes.

    Raises ValueError if the model's tokens have no place in the image, if the inputs were made from images of other
    sizes or with other settings, or if the prompt has more or fewer image tokens.
    """
    check_decoder(model)
    inner = unwrap(model)
    settings = dict(settings or {})
    key = sizes, repr(settings), _settings_of(processor)
    with _LOCK:
        known = _KNOWN.setdefault(inner, {}).get(key)
    if known is None:
        prompts = [build_prompt(processor, "x", len(row)) for row in sizes]
        known = _measure(model, processor, sizes, prompts, settings)
        with _LOCK:
            _KNOWN[inner][key] = known
        placed = int((known.measured.images >= 0).sum())
        _LOG.warning(
            "no layout is known for model_type %r: the boxes of its image tokens were measured, %d of %d show a part "
            "of an image",
            inner.config.model_type,
            placed,
            len(known.measured.images),
        )
    _check_same(inputs, known.pixels)
    tokens = _check_count(inputs["input_ids"], names.image_id(inner.config), known.measured)
    here = Measured(known.measured.boxes, known.measured.images, tokens, sizes)
    return VisualLayout(views_of(here), sizes, measured=True)


def views_of(measured: Measured) -> tuple[tuple[View, ...], ...]:
    """The views of each row: tokens in order that lie beside each other, row by row, are one.

    Tokens in another order become views of fewer tokens, down to one each, which show the same.
    """
    rows: list[list[View]] = [[] for _ in measured.sizes]
    placed = (measured.images >= 0).nonzero().flatten()
    first = 0
    while first < len(placed):
        rest = placed[first:]
        same = (measured.tokens[rest, 0] == measured.tokens[rest[0], 0]) & (
            measured.images[rest] == measured.images[rest[0]]
        )
        run = rest[: int(same.long().cumprod(0).sum())]
        for grid, members in _grids(measured.boxes[run]):
            tokens = run[members]
            row, image = int(measured.tokens[tokens[0], 0]), int(measured.images[tokens[0]])
            box = _outline(measured.boxes[tokens], grid, measured.sizes[row][image])
            whole = box == (0.0, 0.0, float(measured.sizes[row][image][1]), float(measured.sizes[row][image][0]))
            base = whole and not any(view.image == image and view.kind == "base" for view in rows[row])
            columns = measured.tokens[tokens, 1].to(torch.int32)
            rows[row].append(View(columns, grid, box, image, kind="base" if base else "tile"))
        first += len(run)
    return tuple(map(tuple, rows))


def _measure(
    model: nn.Module,
    processor: Any,
    sizes: tuple[tuple[Size, ...], ...],
    prompts: Sequence[str],
    settings: Mapping[str, Any],
) -> _Known:
    inputs: list[Mapping[str, Any]] = []

    def process(images: list[Image.Image]) -> Entries:
        rest = iter(images)
        rows = [[next(rest) for _ in row] for row in sizes]
        padding = {"padding": True} if len(rows) > 1 else {}
        given = rows[0] if len(rows) == 1 else rows
        output = processor(images=given, text=list(prompts), return_tensors="pt", **padding, **settings)
        if not inputs:
            inputs.append(output)
        shape = output["input_ids"].shape
        return {name: value for name, value in output.items() if not _is_text(name, value, shape)}

    pixels, origin = coordinates(process, [size for row in sizes for size in row])
    noise = torch.randn(len(origin.image), generator=torch.Generator().manual_seed(0))
    filling = torch.where(origin.image >= 0, noise, pixels.values(pixels.entries))
    tensors = pixels.tensors()
    parts = filling.split([tensor.numel() for tensor in tensors])
    shaped = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    with influence(model, inputs[0], shaped, pixels.filled) as reached:
        owners = reached.tokens()
        count = len(reached.columns)
        if int((owners == SEVERAL).sum()) > _MIXED * len(owners):
            boxes, images = shared_boxes(reached.gradient, origin, count)
        else:
            boxes, images = boxes_of(owners, origin, count)
    if not bool((images >= 0).any()):
        raise ValueError(
            f"model: expected image tokens that depend on pixels, got {count} of {unwrap(model).config.model_type!r} "
            "that do not; where they lie in the image cannot be measured"
        )
    before = torch.tensor([sum(map(len, sizes[:row])) for row in reached.columns[:, 0].tolist()])
    within = torch.where(images >= 0, images - before, -1)
    return _Known(Measured(boxes, within, reached.columns, sizes), pixels.without_values())


def _grids(boxes: torch.Tensor) -> Iterator[tuple[Size, slice]]:
    """The grids of adjacent boxes [N, 4], row-major, in the order of the boxes."""
    cells = torch.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)

    def meet(one: int, other: int, step: torch.Tensor) -> bool:
        expected = boxes[one] + torch.cat([step, step])
        return bool(((boxes[other] - expected).abs() <= _MEET * torch.cat([cells[one]] * 2)).all())

    first = 0
    while first < len(boxes):
        right, down = cells[first] * torch.tensor([1, 0]), cells[first] * torch.tensor([0, 1])
        end = first + 1
        while end < len(boxes) and meet(end - 1, end, right):
            end += 1
        columns = end - first
        while end + columns <= len(boxes) and all(meet(end - columns + k, end + k, down) for k in range(columns)):
            end += columns
        yield ((end - first) // columns, columns), slice(first, end)
        first = end


def _outline(boxes: torch.Tensor, grid: Size, size: Size) -> Box:
    """The box of a grid of boxes; its edges are the image's where they nearly are."""
    cells = boxes.view(*grid, 4)
    cell = (cells[..., 2:] - cells[..., :2]).mean((0, 1))
    edges = [cells[:, 0, 0], cells[0, :, 1], cells[:, -1, 2], cells[-1, :, 3]]
    found = []
    for number, edge in enumerate(edges):
        value, limit = float(edge.mean()), float(size[1 - number % 2])
        near = min((0.0, limit), key=lambda border: abs(border - value))
        found.append(near if abs(near - value) <= _MEET / 2 * float(cell[number % 2]) else value)
    return found[0], found[1], found[2], found[3]


def _settings_of(processor: Any) -> str:
    parts = (processor, getattr(processor, "image_processor", None))
    return " ".join(str(getattr(part, "to_json_string", lambda: "")()) for part in parts)


def _is_text(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether an entry belongs to the text: by its name, or since it has a value for each token."""
    return names.is_text(name) or (isinstance(value, torch.Tensor) and value.shape[:2] == shape)


def _check_same(inputs: Mapping[str, Any], pixels: Pixels) -> None:
    """Raise ValueError if inputs were made from other images, or with other settings."""
    varying = {path[0] for path in pixels.leaves}
    for name, expected in pixels.entries.items():
        got = inputs.get(name)
        if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
            continue
        if got.shape != expected.shape or (name not in varying and not torch.equal(got.cpu(), expected)):
            raise ValueError(
                f"inputs: {name} is not what the processor makes of images of these sizes ({list(got.shape)}, expected "
                f"{list(expected.shape)}); the layout of this family is measured with the processor's own settings, so "
                "set them on the processor instead of passing them to a call"
            )


def _check_count(input_ids: torch.Tensor, token: int | None, measured: Measured) -> torch.Tensor:
    """The (row, column) of each image token of a prompt."""
    found = torch.eq(input_ids, -1 if token is None else token).nonzero().cpu()
    for row in range(len(measured.sizes)):
        got, expected = (int((tokens[:, 0] == row).sum()) for tokens in (found, measured.tokens))
        if got != expected:
            raise ValueError(
                f"inputs: row {row} has {got} image tokens, images of these sizes need {expected}; the prompt was "
                "probably truncated within an image"
            )
    return found
