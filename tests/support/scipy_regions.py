"""The regions that scipy finds in an image or in frames."""

from __future__ import annotations

import numpy
from scipy import ndimage


def regions_of_scipy(
    values: numpy.ndarray, keep: float, top: int, connectivity: int, score: str
) -> tuple[numpy.ndarray, list[int], list[float]]:
    """The labels of all regions, and the numbers and scores of the best ones, best first."""
    structure = ndimage.generate_binary_structure(values.ndim, {4: 1, 8: 2, 6: 1, 26: 3}[connectivity])
    labels, count = ndimage.label(values >= numpy.percentile(values, 100 * (1 - keep)), structure)
    measure = {"sum": ndimage.sum, "mean": ndimage.mean, "max": ndimage.maximum}[score]
    scores = numpy.asarray(measure(values.astype(numpy.float64), labels, range(1, count + 1)))
    order = numpy.argsort(-scores, kind="stable")[:top]
    return labels, [int(number) + 1 for number in order], scores[order].tolist()
