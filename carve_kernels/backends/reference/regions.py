"""The regions of a saliency with numpy: threshold, label, score, rank, keep."""

from __future__ import annotations

import numpy
import torch

from carve_kernels.backends.reference.labels import label
from carve_kernels.types import TOO_SMALL, RegionOptions, Regions

# Resizing changes a flat map by a few roundings.
FLAT = 16


def supports(*_: object) -> str | None:
    """The reference serves everything."""
    return None


def forward(saliency: torch.Tensor, options: RegionOptions) -> Regions:
    """The selected regions, or the whole image and the reason; see `carve_kernels.regions`."""
    keep, top, floor, connectivity, score, min_size = options
    values = saliency.detach().cpu().numpy()
    reason = _why_none(values)
    if reason is not None:
        return Regions.whole(saliency, reason)

    threshold = values.dtype.type(numpy.percentile(values, 100 * (1 - keep)))
    labels, boxes = label(values >= threshold, connectivity)
    count = len(boxes)
    if count == 0:
        # The percentile overflowed to infinity, which no value reaches.
        return Regions.whole(saliency, "the range of the saliency is too wide for its dtype")
    order, scores = _rank(values, labels, count, score)
    order = order[numpy.bincount(labels.reshape(-1))[1:][order] >= min_size]
    if len(order) == 0:
        return Regions.whole(saliency, TOO_SMALL)
    # The release rounds count * keep down, and selects at least `floor` regions.
    selected = order[: top if floor is None else max(floor, int(len(order) * keep))]

    is_selected = numpy.zeros(count + 1, dtype=bool)
    is_selected[selected + 1] = True
    boxes = boxes[selected]
    axes = values.ndim
    box = tuple(int(edge) for edge in (*boxes[:, :axes].min(0), *boxes[:, axes:].max(0)))
    return Regions(
        mask=torch.from_numpy(is_selected[labels]).to(saliency.device),
        boxes=torch.from_numpy(boxes),
        scores=torch.from_numpy(scores[selected]),
        box=box,
    )


def _why_none(values: numpy.ndarray) -> str | None:
    if values.size == 0:
        return "the saliency is empty"
    low, high = float(values.min()), float(values.max())
    if not numpy.isfinite([low, high]).all():
        return "the saliency is not finite"
    if high - low <= FLAT * float(numpy.finfo(values.dtype).eps) * max(abs(low), abs(high)):
        return "the saliency is constant"
    return None


def _rank(values: numpy.ndarray, labels: numpy.ndarray, count: int, score: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Region numbers from 0, best first, and the score of every region."""
    pixels = numpy.flatnonzero(labels)
    owner = labels.reshape(-1)[pixels] - 1
    inside = values.reshape(-1)[pixels].astype(numpy.float64)

    # Integers have the same sum in any order. 36 bits a pixel fit in int64 up to 2^26 pixels, fewer beyond.
    unit = 2.0 ** min(36, 62 - values.size.bit_length())
    peak = float(numpy.abs(values).max())
    sums = numpy.zeros(count, dtype=numpy.int64)
    numpy.add.at(sums, owner, numpy.rint(inside / peak * unit).astype(numpy.int64))
    scores = sums / unit * peak
    rank: numpy.ndarray = sums
    if score == "mean":
        rank = scores = scores / numpy.bincount(owner, minlength=count)
    elif score == "max":
        rank = scores = numpy.full(count, -numpy.inf)
        numpy.maximum.at(scores, owner, inside)

    # Written from the last pixel to the first, so that each region keeps its first pixel.
    first = numpy.empty(count, dtype=numpy.int64)
    first[owner[::-1]] = pixels[::-1]
    return numpy.lexsort((first, -rank)), scores
