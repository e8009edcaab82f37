"""The visual complexity of an image: edge density and colour entropy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

from carve_kernels import extras

if TYPE_CHECKING:
    from PIL.Image import Image

# Larger images are measured at this longer side, so that a photograph and its thumbnail are comparable.
LONGEST = 1024
HUES = 180


def complexity(image: Image) -> dict[str, float]:
    """Edge density and colour entropy of an image, each from 0 to 1.

    Equals, for an image of 1024 pixels or fewer a side::

        edges = skimage.feature.canny(skimage.color.rgb2gray(rgb)).mean()
        share = numpy.histogram(skimage.color.rgb2hsv(rgb)[..., 0], bins=180, range=(0, 1))[0] / (H * W)
        colours = -(share * log(share)).sum() / log(180)

    Returns {"edges": ..., "colours": ...}. Source: the complexity measures of CARVE, arXiv 2509.06461.
    """
    with extras.needed_by("complexity"):
        from skimage.color import rgb2gray, rgb2hsv
        from skimage.feature import canny

    small = image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST))
    pixels = numpy.asarray(small)
    edges = canny(rgb2gray(pixels))
    counts, _ = numpy.histogram(rgb2hsv(pixels)[..., 0], bins=HUES, range=(0.0, 1.0))
    share = counts[counts > 0] / counts.sum()
    return {"edges": float(edges.mean()), "colours": float((share * -numpy.log(share)).sum() / math.log(HUES)) + 0.0}
