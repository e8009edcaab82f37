"""The connected regions of a mask with numpy: union-find over the runs of pixels of each row of each frame."""

from __future__ import annotations

import numpy


def label(mask: numpy.ndarray, connectivity: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The region of each pixel of a mask [H, W] or [F, H, W], counted from 1 with 0 outside, and each region's box:
    x0 y0 x1 y1 [n, 4] or x0 y0 f0 x1 y1 f1 [n, 6].
    """
    height, width = mask.shape[-2:]
    frames = mask.reshape(-1, height, width)
    # Around each row and each frame something that is not in the mask, so that nothing is connected past an end.
    row_stride, frame_stride = width + 2, (height + 1) * (width + 2)
    framed = numpy.zeros((len(frames), height, width + 2), dtype=numpy.int8)
    framed[:, :, 1:-1] = frames
    change = numpy.diff(framed)
    numbers, rows, starts = numpy.nonzero(change == 1)
    ends = numpy.nonzero(change == -1)[2]
    offsets = numbers * frame_stride + rows * row_stride

    corners = connectivity in (8, 26)
    strides = [row_stride]
    if len(frames) > 1:
        strides += [frame_stride, frame_stride - row_stride, frame_stride + row_stride][: 3 if corners else 1]
    pairs = [_touching_pairs(offsets, starts, ends, stride, corners) for stride in strides]
    first_runs = _connect(len(rows), *map(numpy.concatenate, zip(*pairs, strict=True)))
    roots, regions = numpy.unique(first_runs, return_inverse=True)
    labels = numpy.zeros(frames.shape, dtype=numpy.int64)
    labels[frames] = numpy.repeat(regions + 1, ends - starts)
    lows = [starts, rows, numbers][: mask.ndim]
    highs = [ends, rows + 1, numbers + 1][: mask.ndim]
    boxes = numpy.stack([*lows, *highs], 1)[roots]
    for edge, values in enumerate(lows):
        numpy.minimum.at(boxes[:, edge], regions, values)
    for edge, values in enumerate(highs):
        numpy.maximum.at(boxes[:, mask.ndim + edge], regions, values)
    return labels.reshape(mask.shape), boxes


def _touching_pairs(
    offsets: numpy.ndarray, starts: numpy.ndarray, ends: numpy.ndarray, stride: int, corners: bool
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pairs of runs, the second in the row that is `stride` after the first's, that share an edge or else a corner."""
    over, under = ("left", "right") if corners else ("right", "left")
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
