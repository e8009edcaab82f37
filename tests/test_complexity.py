"""The visual complexity of an image."""

from __future__ import annotations

import numpy
from PIL import Image

from carve_kernels.complexity import complexity
from tests.support.tiny_models import make_image


def test_busy_and_coloured_images_are_more_complex() -> None:
    plain, busy = Image.new("RGB", (200, 100), "white"), make_image(200, 100, 3)
    assert complexity(plain) == {"edges": 0.0, "colours": 0.0}
    assert complexity(busy)["edges"] > 0.05 and complexity(busy)["colours"] > 0.7
    assert complexity(busy.convert("L"))["colours"] == 0.0
    ramp = numpy.zeros((10, 180, 3), dtype=numpy.uint8)
    ramp[..., 2] = 255
    ramp[..., 0] = numpy.arange(180)
    assert 0.2 < complexity(Image.fromarray(ramp))["colours"] < 1
    assert complexity(Image.new("RGB", (1, 1))) == {"edges": 0.0, "colours": 0.0}
