"""Where each value of a processor's pixel tensors comes from in the image, whatever their layout and normalisation.

The processor is run on images of known brightness: black and white give each value's range, ramps its coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image

from carve_kernels.types import Size

Entries = Mapping[str, Any]
Process = Callable[[list[Image.Image]], Entries]
"""From images, in the order of the prompt, to the processor's entries without those of the text."""

_LEVELS = 255
# Values that span less than this share of the largest range come from padding, not from the image.
_PADDING = 0.02
# How far a grey may be from its share of white, among as many greys as images.
_LINEAR = 0.05
_NO_MEANS = (
    "processor: expected pixel values that are weighted means of the image's pixels, got others; where they lie in the "
    "image cannot be measured"
)
# Shortest ramp in pixels, and the share of a longer image that a ramp covers.
_RAMP, _SHARE = 32.0, 8
# By how many of its 8-bit steps a ramp may be wrong: rounded before and after the resampling.
_STEPS = 1.5


class Coordinates(NamedTuple):
    """For each value of the pixel tensors in order, [E] each, where it comes from.

    ======  =======  ===============================================================================
    name    dtype    meaning
    ======  =======  ===============================================================================
    place   float32  [2, E]: x and y in pixels of the image, NaN in padding
    edge    float32  [2, E]: the share of a value that comes from the image's outermost columns, rows
    image   int64    [E]: number of the image, -1 in padding
    ======  =======  ===============================================================================

    Along an edge, a resampled value comes from fewer pixels than elsewhere, so its coordinate is biased inwards.
    """

    place: torch.Tensor
    edge: torch.Tensor
    image: torch.Tensor


class Pixels(NamedTuple):
    """The entries of a processor for one set of images; `leaves` are the tensors that depend on the images' pixels."""

    entries: Entries
    leaves: tuple[tuple[Any, ...], ...]

    def values(self, entries: Entries) -> torch.Tensor:
        """The values of the pixel tensors in other entries of the same shapes, float32 [E]."""
        return torch.cat([_get(entries, path).flatten().float() for path in self.leaves])

    def filled(self, parts: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The entries with other pixel tensors."""
        new = dict(zip(self.leaves, parts, strict=True))
        return {key: _replaced(value, (key,), new) for key, value in self.entries.items()}

    def tensors(self) -> list[torch.Tensor]:
        """The pixel tensors."""
        return [_get(self.entries, path) for path in self.leaves]

    def without_values(self) -> Pixels:
        """The same entries, with pixel tensors of the same shape that take no memory."""
        return self._replace(
            entries=self.filled([tensor.new_empty(tensor.shape, device="meta") for tensor in self.tensors()])
        )


def coordinates(process: Process, sizes: Sequence[Size]) -> tuple[Pixels, Coordinates]:
    """Find the pixel tensors among the entries of images of these sizes, and the origin of each value.

    Raises ValueError if no tensor depends on the pixels, if anything else in the entries does, or if a value is no
    weighted mean of pixels.
    """
    black = process([_flat(size, 0) for size in sizes])
    white = process([_flat(size, _LEVELS) for size in sizes])
    pixels = Pixels(black, tuple(_varying(black, white)))
    if not pixels.leaves:
        raise ValueError("processor: expected tensors that depend on the image's pixels, got none")
    low = pixels.values(black)
    span = pixels.values(white) - low
    inside = span.abs() > _PADDING * span.abs().max()
    low, span = low[inside], span[inside]

    def responses(images: list[Image.Image]) -> torch.Tensor:
        entries = process(images)
        for _ in _varying(black, entries):
            pass
        shares = (pixels.values(entries)[inside] - low) / span
        if not bool(((shares > -0.2) & (shares < 1.2)).all()):
            raise ValueError(_NO_MEANS)
        return shares

    number = _numbers(responses, sizes)
    place = torch.full((2, len(inside)), torch.nan)
    edge = torch.zeros(2, len(inside))
    for row, axis in enumerate((1, 0)):
        lengths = torch.tensor([float(size[axis]) for size in sizes])
        place[row, inside] = _along(responses, sizes, axis, lengths[number])
        edge[row, inside] = responses([_strip(size, axis, _frame) for size in sizes])
    image = torch.full((len(inside),), -1)
    image[inside] = number
    return pixels, Coordinates(place, edge, image)


def _numbers(responses: Callable[[list[Image.Image]], torch.Tensor], sizes: Sequence[Size]) -> torch.Tensor:
    """The number of each value's image, known by its grey. Raises ValueError for values that are not in proportion."""
    greys = [round(_LEVELS * (index + 0.5) / len(sizes)) for index in range(len(sizes))]
    shares = responses([_flat(size, grey) for size, grey in zip(sizes, greys, strict=True)])
    number = (shares * len(sizes)).long().clamp(0, len(sizes) - 1)
    if bool(((shares - torch.tensor(greys)[number] / _LEVELS).abs() > _LINEAR / len(sizes)).any()):
        raise ValueError(_NO_MEANS)
    return number


def _along(
    responses: Callable[[list[Image.Image]], torch.Tensor], sizes: Sequence[Size], axis: int, lengths: torch.Tensor
) -> torch.Tensor:
    """Each value's coordinate along an axis: a ramp over the whole image, then two folded ramps, which are steeper.

    The second of them is folded where the first is straight: resampling blurs the folds. Where it blurs more than that,
    the steep ramps differ from the one over the whole image by more than its steps.
    """
    coarse = responses([_strip(size, axis, lambda at, length: at / length) for size in sizes]) * lengths
    if max(size[axis] for size in sizes) <= _RAMP:
        return coarse
    straight = (lengths / _SHARE).clamp(min=_RAMP)
    best = coarse.clone()
    rest = torch.full_like(coarse, torch.inf)
    for shift in (0.0, 0.5):

        def folded(at: numpy.ndarray[Any, Any], length: int, shift: float = shift) -> numpy.ndarray[Any, Any]:
            phase = (at / max(length / _SHARE, _RAMP) + shift) % 2
            folds: numpy.ndarray[Any, Any] = numpy.minimum(phase, 2 - phase)
            return folds

        shares = responses([_strip(size, axis, folded) for size in sizes])
        phase = coarse / straight + shift
        fold = phase.floor()
        fine = (fold + torch.where(fold.long() % 2 == 0, shares, 1 - shares) - shift) * straight
        off = (phase - fold - 0.5).abs()
        best = torch.where(off < rest, fine, best)
        rest = torch.minimum(off, rest)
    return torch.where((best - coarse).abs() < _STEPS / _LEVELS * lengths, best, coarse)


def _flat(size: Size, level: int) -> Image.Image:
    return Image.new("RGB", (size[1], size[0]), (level,) * 3)


def _strip(size: Size, axis: int, brightness: Callable[[numpy.ndarray[Any, Any], int], Any]) -> Image.Image:
    """An image whose brightness (0 to 1) depends on one coordinate: 0 is y, 1 is x."""
    line = numpy.rint(_LEVELS * brightness(numpy.arange(size[axis]) + 0.5, size[axis])).astype(numpy.uint8)
    plane = numpy.broadcast_to(line[None] if axis else line[:, None], size)
    return Image.fromarray(numpy.repeat(plane[..., None], 3, 2))


def _frame(at: numpy.ndarray[Any, Any], length: int) -> numpy.ndarray[Any, Any]:
    """White in the outermost pixels."""
    ends: numpy.ndarray[Any, Any] = ((at < 1) | (at > length - 1)).astype(float)
    return ends


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors in nested lists and mappings, with their keys."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))


def _varying(first: Entries, second: Entries) -> Iterator[tuple[Any, ...]]:
    """The floating-point tensors that differ. Raises ValueError if shapes or other tensors differ."""
    before, after = dict(_leaves(first)), dict(_leaves(second))
    if before.keys() != after.keys():
        raise ValueError("processor: expected the same entries for all images of a size, got others for other pixels")
    for path, tensor in before.items():
        other, name = after[path], ".".join(map(str, path))
        if tensor.shape != other.shape:
            raise ValueError(
                f"processor: expected one shape of {name} for all images of a size, got {list(tensor.shape)} and "
                f"{list(other.shape)} for other pixels"
            )
        if torch.equal(tensor, other):
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"processor: expected {name} to be the same for all images of a size, got other values")
        yield path


def _get(entries: Any, path: tuple[Any, ...]) -> torch.Tensor:
    for key in path:
        entries = entries[key]
    found: torch.Tensor = entries
    return found


def _replaced(value: Any, path: tuple[Any, ...], new: Mapping[tuple[Any, ...], torch.Tensor]) -> Any:
    if path in new:
        return new[path]
    if isinstance(value, Mapping):
        return {key: _replaced(inner, (*path, key), new) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(inner, (*path, index), new) for index, inner in enumerate(value)]
    return value
