"""The regions that scipy finds in an image or in frames."""

from __future__ import annotations

import numpy
from scipy import ndimage


def regions_of_scipy(
    values: numpy.ndarray, keep: float, top: int | None, connectivity: int, score: str, min_size: int = 1
) -> tuple[numpy.ndarray, list[int], list[float]]:
    """The labels of all regions, and the numbers and scores of the best ones, best first."""
    structure = ndimage.generate_binary_structure(values.ndim, {4: 1, 8: 2, 6: 1, 26: 3}[connectivity])
    labels, count = ndimage.label(values >= numpy.percentile(values, 100 * (1 - keep)), structure)
    measure = {"sum": ndimage.sum, "mean": ndimage.mean, "max": ndimage.maximum}[score]
    large = 1 + numpy.flatnonzero(ndimage.sum(labels > 0, labels, range(1, count + 1)) >= min_size)
    scores = numpy.asarray(measure(values.astype(numpy.float64), labels, large))
    order = numpy.argsort(-scores, kind="stable")[:top]
    return labels, large[order].tolist(), scores[order].tolist()
