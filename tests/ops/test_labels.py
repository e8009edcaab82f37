"""The connected regions of the reference against scipy's."""

from __future__ import annotations

import numpy
import pytest
from scipy import ndimage

from carve_kernels.backends.reference.labels import label


def spiral(size: int) -> numpy.ndarray:
    """One region whose runs are connected one after the other to the centre."""
    mask = numpy.zeros((size, size), dtype=bool)
    y, x, step = 0, -1, (0, 1)
    for length in [size, *(left for left in range(size - 1, 0, -2) for _ in range(2))]:
        for _ in range(length):
            y, x = y + step[0], x + step[1]
            mask[y, x] = True
        step = (step[1], -step[0])
    return mask


def masks() -> dict[str, numpy.ndarray]:
    random = numpy.random.default_rng(0)
    shapes = [(1, 1), (1, 9), (9, 1), (7, 64), (64, 7), (41, 53)]
    noise = {
        f"{shape} {share}": random.random(shape) < share for shape in shapes for share in (0, 0.2, 0.5, 0.6, 0.8, 1)
    }
    checkers = numpy.indices((9, 9)).sum(0) % 2 == 0
    return {**noise, "spiral": spiral(41), "checkers": checkers}


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("connectivity", [4, 8])
def test_labels_are_scipys(name: str, connectivity: int) -> None:
    mask = masks()[name]
    labels, boxes = label(mask, connectivity)
    wanted, count = ndimage.label(mask, ndimage.generate_binary_structure(2, connectivity // 4))
    assert len(boxes) == count and numpy.array_equal(labels > 0, mask)
    # The same regions under other numbers, which here are in the order of the first pixels.
    pairs, first = numpy.unique(numpy.stack([labels[mask], wanted[mask]]), axis=1, return_index=True)
    assert pairs.shape[1] == count and numpy.array_equal(first, numpy.sort(first))
    found = ndimage.find_objects(labels)
    assert boxes.tolist() == [[x.start, y.start, x.stop, y.stop] for y, x in found]
