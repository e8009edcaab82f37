"""The connected regions of a mask with numpy: union-find over the runs of pixels of each row."""

from __future__ import annotations

import numpy


def label(mask: numpy.ndarray, connectivity: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The region of each pixel [H, W], counted from 1 with 0 outside, and the box x0 y0 x1 y1 of each region [n, 4]."""
    height, width = mask.shape
    framed = numpy.zeros((height, width + 2), dtype=numpy.int8)
    framed[:, 1:-1] = mask
    change = numpy.diff(framed)
    rows, starts = numpy.nonzero(change == 1)
    ends = numpy.nonzero(change == -1)[1]

    first_runs = _connect(len(rows), *_touching_pairs(rows * (width + 2), starts, ends, width + 2, connectivity))
    roots, regions = numpy.unique(first_runs, return_inverse=True)
    labels = numpy.zeros((height, width), dtype=numpy.int64)
    labels[mask] = numpy.repeat(regions + 1, ends - starts)
    boxes = numpy.stack([starts, rows, ends, rows + 1], 1)[roots]
    for edge, values in ((0, starts), (1, rows)):
        numpy.minimum.at(boxes[:, edge], regions, values)
    for edge, values in ((2, ends), (3, rows + 1)):
        numpy.maximum.at(boxes[:, edge], regions, values)
    return labels, boxes


def _touching_pairs(
    offsets: numpy.ndarray, starts: numpy.ndarray, ends: numpy.ndarray, stride: int, connectivity: int
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pairs of runs of neighbouring rows that share an edge or, 8-connected, a corner."""
    over, under = ("right", "left") if connectivity == 4 else ("left", "right")
    below = offsets + stride
    first = numpy.searchsorted(offsets + ends, below + starts, over)  # type: ignore[call-overload]
    last = numpy.searchsorted(offsets + starts, below + ends, under)  # type: ignore[call-overload]
    counts = numpy.maximum(last - first, 0)
    upper = numpy.repeat(numpy.arange(len(counts)), counts)
    lower = numpy.arange(len(upper)) - numpy.repeat(numpy.cumsum(counts) - counts - first, counts)
    return upper, lower


def _connect(count: int, left: numpy.ndarray, right: numpy.ndarray) -> numpy.ndarray:
    """For each of `count` runs, the first run that the pairs (left, right) connect it to."""
    first = numpy.arange(count)
    while True:
        lower = first.copy()
        low = numpy.minimum(first[left], first[right])
        numpy.minimum.at(lower, first[left], low)
        numpy.minimum.at(lower, first[right], low)
        while not numpy.array_equal(lower, lower[lower]):
            lower = lower[lower]
        if numpy.array_equal(lower, first):
            return first
        first = lower
