"""Several views of one image become one saliency: the overlap rule, padding, and pixels that no view covers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import Preset, View, carve, contrast, regions
from carve_kernels.pipeline import CarveOutcome, carve_views
from carve_kernels.types import Box, Size
from carve_kernels.view_pixels import combine, rectangle, seen_pixels, select
from tests.support.planted_maps import maps

PRESET = Preset.paper(lam=0.01)


def photograph(width: int, height: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def outcome(size: Size, grids: list[Size], boxes: list[Box], preset: Preset = PRESET, seed: int = 3) -> CarveOutcome:
    task, general = maps((1, sum(rows * columns for rows, columns in grids)), layers=2, steps=2, seed=seed)
    return carve_views(photograph(size[1], size[0]), task, general, grids, boxes, preset, "reference")


def by_pixel(size: Size, grids: list[Size], boxes: list[Box], overlap: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The saliency and the seen pixels by the documented rule, pixel by pixel in float64."""
    task, general = maps((1, sum(rows * columns for rows, columns in grids)), layers=2, steps=2, seed=3)
    edges = [tuple(round(edge) for edge in box) for box in boxes]
    sizes = [(bottom - top, right - left) for left, top, right, bottom in edges]
    views = contrast(task[:, 1:].double(), general[:, 1:].double(), grids, sizes, lam=0.01, step_weights=[1.0])
    saliency, seen = numpy.zeros(size), numpy.zeros(size, dtype=bool)
    for y in range(size[0]):
        for x in range(size[1]):
            found = []
            for view, (left, top, right, bottom), grid, box in zip(views, edges, grids, boxes, strict=True):
                if left <= x < right and top <= y < bottom:
                    area = (box[2] - box[0]) * (box[3] - box[1])
                    found.append((float(view[y - top, x - left]), grid[0] * grid[1] / area))
            if found:
                values, weights = numpy.transpose(found)
                seen[y, x] = True
                saliency[y, x] = values.max() if overlap == "max" else (values * weights).sum() / weights.sum()
    return saliency, seen


@pytest.mark.parametrize("overlap", ["mean", "max"])
@pytest.mark.parametrize(
    ("size", "grids", "boxes"),
    [
        # A thumbnail and four tiles; tiles over a canvas that is padded right and bottom; crops that overlap and
        # leave most of the image unseen; a letterbox.
        ((41, 60), [(3, 3), *[(4, 4)] * 4],
         [(0, 0, 60, 41), (0, 0, 30, 20), (30, 0, 60, 20), (0, 20, 30, 41), (30, 20, 60, 41)]),
        ((23, 37), [(4, 4), (4, 4), (3, 5)], [(0, 0, 25, 30), (25, 0, 50, 30), (0, 0, 37, 23)]),
        ((30, 44), [(3, 4), (5, 2)], [(4, 3, 20, 17), (12, 9, 40, 26)]),
        ((20, 50), [(6, 6)], [(0, -15, 50, 35)]),
    ],
)  # fmt: skip
def test_views_are_combined_by_the_documented_rule(
    size: Size, grids: list[Size], boxes: list[Box], overlap: str
) -> None:
    found = outcome(size, grids, boxes, Preset.paper(lam=0.01, overlap=overlap))
    saliency, seen = by_pixel(size, grids, boxes, overlap)
    assert numpy.array_equal(found.seen.numpy(), seen)
    assert numpy.allclose(found.saliency.numpy(), saliency, rtol=2e-5, atol=0)
    other = by_pixel(size, grids, boxes, "mean" if overlap == "max" else "max")[0]
    assert len(boxes) == 1 or not numpy.allclose(other, saliency, rtol=1e-2), "both rules give the same here"


def test_pixels_of_one_view_have_exactly_its_values() -> None:
    task, general = maps((1, 12 + 20), steps=1)
    boxes = [(0.0, 0.0, 31.0, 40.0), (31.0, 0.0, 60.0, 40.0)]
    both = carve(photograph(60, 40), task, general, grid=[(3, 4), (5, 4)], box=boxes, preset=PRESET)
    views = contrast(task, general, [(3, 4), (5, 4)], [(40, 31), (40, 29)], lam=0.01)
    assert torch.equal(both.saliency, torch.cat(views, 1)) and bool(both.seen.all())


def test_views_of_a_layout_may_reach_into_padding() -> None:
    """Numbers are refused there, since they may be of another image."""
    task, general = maps((1, 12 + 20), steps=1)
    boxes: list[Box] = [(-10.0, -0.5, 45.0, 52.0), (45.0, 0.0, 61.0, 40.5)]
    grids: list[Size] = [(3, 4), (5, 4)]
    views = [View(torch.arange(grid[0] * grid[1]), grid, box) for grid, box in zip(grids, boxes, strict=True)]
    image = photograph(60, 40)
    expected = carve_views(image, task, general, grids, boxes, PRESET, "auto")
    found = carve(image, task, general, grid=views, preset=PRESET)
    assert torch.equal(found.saliency, expected.saliency) and bool(found.seen.all())
    assert torch.equal(found.regions.mask, expected.regions.mask)
    single = carve(image, task[..., :12], general[..., :12], grid=views[0], preset=PRESET)
    assert not single.seen[:, 45:].any() and bool(single.seen[:, :45].all())
    assert not single.regions.mask[:, 45:].any() and single.regions.box[2] <= 45
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "box: expected 0 <= x0", {"grid": grids, "box": boxes}),
        (ValueError, "box: expected None with views, which have their boxes, got list", {"grid": views, "box": boxes}),
        (TypeError, "grid: expected sizes or views, got both, 1 views of 2", {"grid": [views[0], (5, 4)]}),
        (ValueError, "grid: expected views of one image", {"grid": [views[0], replace(views[1], image=1)]}),
        (ValueError, "grid: expected views of one image", {"grid": [views[0], replace(views[1], frame=(0, 1))]}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            carve(image, task, general, preset=PRESET, **options)


def test_tiles_leave_no_gap_between_them() -> None:
    # 101 / 2 is in the middle of a pixel, and n * (101 / n / 2) is a rounding below or above it.
    for height in range(1, 140):
        for count in range(1, 13):
            side = height / count
            edges = [index * side for index in range(count + 1)]
            again = [index * height / count for index in range(count + 1)]
            boxes = [(0.0, low, 5.0, high) for (low, _), (_, high) in pairwise(zip(edges, again, strict=True))]
            assert bool(
                seen_pixels([rectangle(box, (height, 5)) for box in boxes], (height, 5), torch.device("cpu")).all()
            )


@pytest.mark.parametrize("box", [(0, 40, 30, 55), (50, 0, 70, 20), (-20, 0, -0.0000001, 20)])
def test_a_view_beside_the_image_is_not_on_it(box: Box) -> None:
    assert rectangle(box, (40, 50)) is None
    grids: list[Size] = [(4, 5), (2, 2)]
    found = outcome((40, 50), grids, [(0, 0, 50, 40), box])
    task, general = maps((1, 24), layers=2, steps=2, seed=3)
    sizes = [(40, 50), (1, 1)]
    whole, _ = contrast(task[:, 1:], general[:, 1:], grids, sizes, lam=0.01, step_weights=[1.0], backend="reference")
    assert torch.equal(found.saliency, whole) and bool(found.seen.all())
    nothing = outcome((40, 50), [(2, 2)], [box])
    assert nothing.reason == "the model was shown no part of it" and not nothing.seen.any()


SEEN = [(0, 0, 14, 21), (6, 9, 33, 17), (25, 2, 40, 30)]


def mask_of(boxes: list[tuple[int, int, int, int]], size: Size) -> torch.Tensor:
    return seen_pixels(boxes, size, torch.device("cpu"))


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.4, 0.77, 1.0])
@pytest.mark.parametrize("limits", [{"top": 2, "floor": None}, {"top": None, "floor": 1}, {"top": None, "floor": 3}])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_unseen_pixels_are_in_no_region_and_no_share(keep: float, limits: dict[str, int | None], backend: str) -> None:
    from scipy import ndimage

    seen = mask_of(SEEN, (30, 40))
    generator = torch.Generator().manual_seed(4)
    noise = torch.rand(30, 40, generator=generator)
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise.numpy(), 1.2))
    saliency = torch.where(seen, smooth, 0)
    found = select(saliency, seen, Preset.paper(keep=keep, **limits), backend)
    values, inside = saliency.numpy(), seen.numpy()
    above = (values >= numpy.percentile(values[inside], 100 * (1 - keep)).astype(numpy.float32)) & inside
    labels, count = ndimage.label(above)
    scores = ndimage.sum(values, labels, range(1, count + 1))
    best = numpy.argsort(scores)[::-1][: limits["top"] or max(limits["floor"], int(count * keep))]
    assert count > 1 or keep > 0.5
    assert numpy.array_equal(found.mask.numpy(), numpy.isin(labels, best + 1))
    assert torch.allclose(found.scores, torch.from_numpy(scores[best]).double(), rtol=1e-6)
    assert found.boxes.tolist() == [
        [columns.start, rows.start, columns.stop, rows.stop]
        for rows, columns in (ndimage.find_objects(labels)[index] for index in best)
    ]


def test_seen_pixels_that_are_flat_have_no_region() -> None:
    seen = mask_of(SEEN, (30, 40))
    found = select(torch.where(seen, 0.3, 0.0), seen, PRESET, "auto")
    assert found.reason == "the saliency is constant" and found.box == (0, 0, 40, 30)


def test_one_view_of_an_image_is_what_the_stages_give() -> None:
    task, general = maps((6, 8), layers=2, steps=1)
    for box in ((0, 0, 61, 43), (10.5, 3, 50.5, 40), (-0.5, 0, 61.5, 43)):
        found = carve(photograph(61, 43), task, general, grid=(6, 8), box=box)
        left, top, right, bottom = (min(max(0, round(edge)), (61, 43)[at % 2]) for at, edge in enumerate(box))
        saliency = contrast(task, general, (6, 8), (bottom - top, right - left), step_weights=[1.0])
        selected = regions(saliency, keep=0.4, top=2)
        assert torch.equal(found.saliency[top:bottom, left:right], saliency)
        assert torch.equal(found.regions.mask[top:bottom, left:right], selected.mask)
        assert torch.equal(found.regions.boxes, selected.boxes + torch.tensor([left, top, left, top]))
        assert torch.equal(found.regions.scores, selected.scores) and found.regions.mask.sum() == selected.mask.sum()


def test_the_overlap_is_a_value_of_presets() -> None:
    assert Preset.paper().overlap == Preset.release().overlap == "mean"
    assert Preset.of({"preset": "release", "overlap": "max"}).to_dict() == {"preset": "release", "overlap": "max"}
    with pytest.raises(ValueError, match="overlap: expected one of 'mean', 'max'"):
        Preset.paper(overlap="sum")


def test_combining_holds_one_view_at_a_time() -> None:
    alive: list[int] = []

    def views() -> object:
        for _ in range(4):
            alive.append(1)
            yield torch.ones(4, 6)

    rectangles = [(0, 0, 6, 4)] * 4
    assert bool((combine(views(), rectangles, [1.0, 2.0, 3.0, 4.0], (4, 6), "mean") == 1).all()) and len(alive) == 4  # type: ignore[arg-type]
