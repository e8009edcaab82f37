"""Layouts measured through a model's own processor and vision tower, with no knowledge of its family.

The processor says where each pixel value comes from (`coordinates`), the tower which token it reaches (`influence`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import nn

from carve_kernels.checks import size as check_size
from carve_kernels.hf import names, processors
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.layouts.coordinates import Coordinates, Entries, Pixels, coordinates
from carve_kernels.hf.layouts.influence import SEVERAL, Influence, influence
from carve_kernels.hf.layouts.token_boxes import OnlyPadded, Patterns, boxes_of, patterns_of, shared_boxes
from carve_kernels.hf.model import check_decoder, unwrap
from carve_kernels.types import Box, Size, View, ViewKind, VisualLayout

_LOG = logging.getLogger("carve_kernels")
# Fewer values than this share that reach several tokens are accidents of a gradient.
_MIXED = 0.01
# Of a cell's side: the largest gap between boxes that meet.
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
    return _measure(model, _Call(processor, ((check_size("size", size),),), prompts, settings or {})).measured


def measured_layout(
    model: nn.Module, processor: Any, inputs: Mapping[str, Any], sizes: tuple[tuple[Size, ...], ...]
) -> VisualLayout:
    """The layout of a batch of any family; `sizes` has the (height, width) of the images of each row.

    It is measured once for each model, settings of the processor and sizes. A bound of pixels that the call of the
    processor had is found by trying.

    Raises ValueError if the model's tokens have no place in the image, if the inputs were made from images of other
    sizes or with other settings, or if the prompt has more or fewer image tokens.
    """
    check_decoder(model)
    inner = unwrap(model)
    shapes = {name: tuple(value.shape) for name, value in inputs.items() if _is_pixels(value)}
    key = sizes, repr(shapes), _settings_of(processor)
    with _LOCK:
        known = _KNOWN.setdefault(inner, {}).get(key)
    if known is None:
        call = _Call(processor, sizes, [build_prompt(processor, "x", len(row)) for row in sizes], {})
        known = _measure(model, call._replace(bound=_bound(call, inputs)))
        with _LOCK:
            first = not _KNOWN[inner]
            _KNOWN[inner][key] = known
        if first:
            _LOG.warning(
                "no layout is known for model_type %r: where its image tokens lie is measured; %d of %d show a part of "
                "the image; carve-kernels doctor --model draws them",
                inner.config.model_type,
                int((known.measured.images >= 0).sum()),
                len(known.measured.images),
            )
    difference = _difference(inputs, known.pixels.entries, {path[0] for path in known.pixels.leaves})
    if difference is not None:
        raise ValueError(
            f"inputs: {difference}; the layout of this family is measured with the processor's own settings, so set "
            "them on the processor instead of passing them to a call"
        )
    tokens = _check_count(inputs["input_ids"], names.image_id(inner.config), known.measured)
    here = Measured(known.measured.boxes, known.measured.images, tokens, sizes)
    return VisualLayout(views_of(here), sizes, measured=True)


def views_of(measured: Measured) -> tuple[tuple[View, ...], ...]:
    """The views of each row: tokens in order that lie beside each other, row by row, are one.

    Tokens in another order become views of fewer tokens, down to one each, which show the same.
    """
    rows: list[tuple[View, ...]] = []
    for row, sizes in enumerate(measured.sizes):
        views: list[View] = []
        for image, size in enumerate(sizes):
            here = (measured.tokens[:, 0] == row) & (measured.images == image)
            boxes, columns = measured.boxes[here], measured.tokens[here, 1].to(torch.int32)
            grids = list(_grids(boxes))
            outlines = [_outline(boxes[members], grid) for grid, members in grids]
            for (grid, members), box in zip(grids, _joined(outlines, grids, size), strict=True):
                whole = box == (0.0, 0.0, float(size[1]), float(size[0]))
                first = not any(view.image == image and view.kind == "base" for view in views)
                kind: ViewKind = "base" if first and (whole or len(grids) == 1) else "tile"
                views.append(View(columns[members], grid, box, image, kind=kind))
        rows.append(tuple(views))
    return tuple(rows)


class _Call(NamedTuple):
    """A call of a processor: the images of each row, the prompts, more arguments, and a bound of pixels."""

    processor: Any
    sizes: tuple[tuple[Size, ...], ...]
    prompts: Sequence[str]
    settings: Mapping[str, Any]
    bound: int | None = None

    def __call__(self, images: list[Image.Image]) -> Mapping[str, Any]:
        """What the processor makes of images, in the order of the prompts."""
        if len(self.sizes) == 1 and not self.settings:
            output: Mapping[str, Any] = prepare(self.processor, images, self.prompts[0], None, self.bound)
            return output
        rest = iter(images)
        rows = [[next(rest) for _ in row] for row in self.sizes]
        padding = {"padding": True} if len(rows) > 1 else {}
        given = rows[0] if len(rows) == 1 else rows
        output = self.processor(images=given, text=list(self.prompts), return_tensors="pt", **padding, **self.settings)
        return output

    def entries(self, images: list[Image.Image]) -> Entries:
        """The entries without those of the text."""
        output = self(images)
        return {name: value for name, value in output.items() if not _is_text(name, value, output)}

    def blank(self) -> list[Image.Image]:
        """Black images of these sizes."""
        return [Image.new("RGB", (width, height)) for row in self.sizes for height, width in row]

    def squares(self) -> _Call:
        """The same with large square images, of which processors pad little or nothing."""
        side = 2 * max(max(size) for row in self.sizes for size in row)
        return self._replace(sizes=tuple(tuple((side, side) for _ in row) for row in self.sizes))


def _measure(model: nn.Module, call: _Call) -> _Known:
    with _reached(model, call) as (pixels, origin, reached):
        owners, count = reached.tokens(), len(reached.columns)
        if int((owners == SEVERAL).sum()) > _MIXED * len(owners):
            boxes, images = shared_boxes(reached.gradient, origin, count)
        else:
            try:
                boxes, images = boxes_of(owners, origin, count)
            except OnlyPadded:
                boxes, images = boxes_of(owners, origin, count, _patterns(model, call.squares()))
        columns = reached.columns
    if not bool((images >= 0).any()):
        raise ValueError(
            f"model: expected image tokens that depend on pixels, got {count} of {unwrap(model).config.model_type!r} "
            "that do not; where they lie in the image cannot be measured"
        )
    before = torch.tensor([sum(map(len, call.sizes[:row])) for row in columns[:, 0].tolist()])
    within = torch.where(images >= 0, images - before, -1)
    return _Known(Measured(boxes, within, columns, call.sizes), pixels.without_values())


def _patterns(model: nn.Module, call: _Call) -> Patterns:
    with _reached(model, call) as (_, origin, reached):
        return patterns_of(reached.tokens(), origin, len(reached.columns))


@contextmanager
def _reached(model: nn.Module, call: _Call) -> Iterator[tuple[Pixels, Coordinates, Influence]]:
    """The pixel tensors of a call, where their values come from, and which token each reaches."""
    pixels, origin = coordinates(call.entries, [size for row in call.sizes for size in row])
    noise = torch.randn(len(origin.image), generator=torch.Generator().manual_seed(0))
    filling = torch.where(origin.image >= 0, noise, pixels.values(pixels.entries))
    tensors = pixels.tensors()
    parts = filling.split([tensor.numel() for tensor in tensors])
    shaped = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    with influence(model, call(call.blank()), shaped, pixels.filled) as reached:
        yield pixels, origin, reached


def _bound(call: _Call, inputs: Mapping[str, Any]) -> int | None:
    """The bound of pixels with which a call of the processor made inputs of these images; None if it had none."""
    images = call.blank()

    def count(bound: int | None) -> tuple[int, bool]:
        entries = call._replace(bound=bound).entries(images)
        pixels = {name for name, value in entries.items() if _is_pixels(value)}
        return sum(entries[name].numel() for name in pixels), _difference(inputs, entries, pixels) is None

    most, same = count(None)
    wanted = sum(value.numel() for name, value in inputs.items() if _is_pixels(value) and not processors.is_text(name))
    if same or len(call.sizes) > 1 or wanted >= most:
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        got, same = count(middle)
        if same:
            return middle
        low, high = (middle + 1, high) if got < wanted else (low, middle)
    return None


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


def _outline(boxes: torch.Tensor, grid: Size) -> Box:
    """The box of a grid of boxes."""
    cells = boxes.view(*grid, 4)
    edges = (cells[:, 0, 0], cells[0, :, 1], cells[:, -1, 2], cells[-1, :, 3])
    left, top, right, bottom = (float(edge.mean()) for edge in edges)
    return left, top, right, bottom


def _joined(boxes: list[Box], grids: list[tuple[Size, slice]], size: Size) -> list[Box]:
    """The boxes with edges that nearly meet each other, or an edge of the image, made equal."""
    found = [list(box) for box in boxes]
    for axis in (0, 1):
        cells = [(box[axis + 2] - box[axis]) / grid[1 - axis] for box, (grid, _) in zip(boxes, grids, strict=True)]
        near = _MEET / 2 * min(cells, default=0.0)
        edges = sorted((box[index], number, index) for number, box in enumerate(boxes) for index in (axis, axis + 2))
        groups: list[list[tuple[float, int, int]]] = []
        for edge in edges:
            if not groups or edge[0] - groups[-1][0][0] > near:
                groups.append([])
            groups[-1].append(edge)
        for group in groups:
            mean = sum(edge[0] for edge in group) / len(group)
            border = min((0.0, float(size[1 - axis])), key=lambda border: abs(border - mean))
            for _, number, index in group:
                found[number][index] = border if abs(border - mean) <= near else mean
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in found]


def _settings_of(processor: Any) -> str:
    """The settings of a processor and of its image processor."""
    return " ".join(map(_written, (processor, getattr(processor, "image_processor", None))))


def _written(part: Any) -> str:
    try:
        return str(getattr(part, "to_json_string", lambda: "")())
    # A processor without a file of one of its parts (Ernie's font) cannot be written.
    except Exception:
        plain = (bool, int, float, str, list, tuple, dict)
        return repr({name: value for name, value in vars(part).items() if isinstance(value, plain)})


def _is_text(name: str, value: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether an entry belongs to the text: by its name, or since it has a value for each token."""
    shape = inputs["input_ids"].shape
    return processors.is_text(name) or (isinstance(value, torch.Tensor) and value.shape[:2] == shape)


def _is_pixels(value: Any) -> bool:
    """Whether an entry may be a pixel tensor."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _difference(inputs: Mapping[str, Any], entries: Entries, pixels: set[Any]) -> str | None:
    """In what inputs differ from the entries of a processor, the values of pixel tensors aside, or None."""
    for name, expected in entries.items():
        got = inputs.get(name)
        if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
            continue
        if got.shape != expected.shape or (name not in pixels and not torch.equal(got.cpu(), expected)):
            return (
                f"{name} of shape {list(got.shape)} is not what the processor makes of images of these sizes, "
                f"{list(expected.shape)}"
            )
    return None


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
