"""Regions over space and time: against scipy, a region that goes on through time, one frame, and errors."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from carve_kernels import regions
from carve_kernels.types import TOO_SMALL, RegionOptions
from tests.support.planted_maps import SALIENCIES, assert_same, backends, on_gpu, serving
from tests.support.scipy_regions import regions_of_scipy

SHAPES = [(1, 7, 9), (5, 1, 1), (2, 1, 41), (3, 40, 1), (7, 9, 11), (4, 31, 70), (2, 65, 33), (9, 5, 64)]


@pytest.fixture(params=[*backends("regions"), *on_gpu("regions")])
def backend(request: pytest.FixtureRequest) -> str:
    return serving("regions", request.param, torch.rand(2, 4, 4), RegionOptions(0.2, top=2, connectivity=6))


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("connectivity", [6, 26])
@pytest.mark.parametrize(("keep", "score", "dtype"), [(0.15, "sum", 32), (0.3, "mean", 64), (0.5, "max", 32)])
def test_equals_scipy(
    backend: str, shape: tuple[int, ...], connectivity: int, keep: float, score: str, dtype: int
) -> None:
    # Of all frames, one after the other, every second column: not dense.
    values = noise((*shape[:2], 2 * shape[2]), getattr(torch, f"float{dtype}"))[..., ::2]
    found = regions(values, keep=keep, top=3, connectivity=connectivity, score=score, backend=backend)
    labels, kept, scores = regions_of_scipy(values.numpy(), keep, 3, connectivity, score)
    assert found.reason is None and found.boxes.shape == (len(kept), 6)
    assert numpy.array_equal(found.mask.numpy(), numpy.isin(labels, kept))
    slices = ndimage.find_objects(labels)
    for box, number in zip(found.boxes.tolist(), kept, strict=True):
        frames, rows, columns = slices[number - 1]
        assert box == [columns.start, rows.start, frames.start, columns.stop, rows.stop, frames.stop]
    numpy.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-9)
    assert found.box == (*found.boxes[:, :3].amin(0).tolist(), *found.boxes[:, 3:].amax(0).tolist())


def test_a_region_goes_on_through_time_and_back(backend: str) -> None:
    # Two spots in the first frame that are one region by a bridge in the last: a U through time.
    values = torch.zeros(6, 20, 40)
    values[:, 5, 3] = values[:, 5, 37] = 1
    values[5, 5, 3:38] = 1
    # Shifted by one pixel from frame to frame, over a corner: one region of 26, six of 6.
    for frame in range(6):
        values[frame, 12 + frame, 10 + frame] = 2
    keep = float((values > 0).double().mean())
    sides = regions(values, keep=keep, top=99, backend=backend)
    assert sides.boxes.tolist()[0] == [3, 5, 0, 38, 6, 6] and len(sides.boxes) == 7
    corners = regions(values, keep=keep, top=99, connectivity=26, backend=backend)
    assert corners.boxes.tolist() == [[3, 5, 0, 38, 6, 6], [10, 12, 0, 16, 18, 6]]
    assert corners.scores.tolist() == [45.0, 12.0]
    # What is in its place two frames later is another region.
    values.zero_()
    values[0, 3, 3] = values[2, 3, 3] = 1
    assert len(regions(values, keep=2 / values.numel(), top=9, connectivity=26, backend=backend).boxes) == 2


@pytest.mark.parametrize("connectivity", [6, 26])
@pytest.mark.parametrize("score", ["sum", "mean", "max"])
def test_a_size_is_the_pixels_of_all_frames(backend: str, connectivity: int, score: str) -> None:
    values = torch.zeros(5, 9, 40)
    values[:, 4, 3] = 2  # 5 pixels, one a frame
    values[2, 2:4, 20:22] = 3  # 4 pixels of one frame
    values[0, 0, 39] = 9
    options: dict[str, Any] = {"connectivity": connectivity, "score": score, "backend": backend}
    for min_size, count in ((1, 3), (2, 2), (4, 2), (5, 1)):
        found = regions(values, keep=10 / values.numel(), min_size=min_size, **options)
        assert len(found.boxes) == count and found.reason is None
    assert found.boxes.tolist() == [[3, 4, 0, 4, 5, 5]] and found.mask.sum() == 5
    none = regions(values, keep=10 / values.numel(), min_size=6, top=2, **options)
    assert none.reason == TOO_SMALL and none.box == (0, 0, 0, 40, 9, 5) and bool(none.mask.all())
    dense = noise((4, 23, 37))
    found = regions(dense, keep=0.2, min_size=4, **options)
    labels, selected, scores = regions_of_scipy(dense.numpy(), 0.2, None, connectivity, score, 4)
    assert numpy.array_equal(found.mask.numpy(), numpy.isin(labels, selected)) and len(selected) == len(found.boxes)
    numpy.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-9)


def test_rows_and_frames_do_not_touch_past_their_ends(backend: str) -> None:
    # The last row of a frame is before the first of the next one in memory, the last column before the first.
    values = torch.zeros(3, 4, 5)
    values[0, 3, 2] = values[1, 0, 2] = values[1, 2, 4] = values[2, 3, 0] = values[2, 1, 0] = 1
    found = regions(values, keep=5 / values.numel(), top=9, connectivity=26, backend=backend)
    assert len(found.boxes) == 5
    assert found.boxes[:, [2, 1, 0]].tolist() == sorted(found.boxes[:, [2, 1, 0]].tolist())


def test_one_frame_is_an_image(backend: str) -> None:
    for kind in sorted(SALIENCIES):
        values = SALIENCIES[kind](noise((37, 43)))
        for image, video in ((4, 6), (8, 26)):
            flat = regions(values, keep=0.3, floor=3, connectivity=image, backend=backend)
            found = regions(values[None], keep=0.3, floor=3, connectivity=video, backend=backend)
            assert torch.equal(found.mask[0], flat.mask) and torch.equal(found.scores, flat.scores)
            assert found.reason == flat.reason and found.box == (*flat.box[:2], 0, *flat.box[2:], 1)
            assert torch.equal(found.boxes[:, [0, 1, 3, 4]], flat.boxes)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 20), st.integers(1, 40)),
    kind=st.sampled_from(sorted(SALIENCIES)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    keep=st.one_of(st.sampled_from([0.05, 0.2, 0.5, 1.0, 1e-17]), st.floats(1e-6, 1.0)),
    limit=st.sampled_from([{"top": 1}, {"top": 10**9}, {"floor": 3}, {"min_size": 3}, {"min_size": 8, "floor": 2}]),
    connectivity=st.sampled_from([6, 26]),
    score=st.sampled_from(["sum", "mean", "max"]),
    seed=st.integers(0, 999),
)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_the_compiled_backend_is_the_reference(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, keep: float, limit: Any, seed: int, **options: Any
) -> None:
    serving("regions", "cpu", torch.rand(2, 4, 4), RegionOptions(keep, **limit, **options))
    values = SALIENCIES[kind](noise(shape, dtype, seed))
    options |= {"keep": keep, "check": False, **limit}
    assert_same(regions(values, backend="cpu", **options), regions(values, backend="reference", **options))


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_without_values_there_is_no_region(backend: str, shape: tuple[int, ...]) -> None:
    found = regions(torch.zeros(shape), keep=0.2, top=2, backend=backend)
    assert found.reason == "the saliency is empty" and found.boxes.shape == (0, 6)
    assert found.box == (0, 0, 0, shape[2], shape[1], shape[0])


def test_a_constant_saliency_selects_all_frames(backend: str) -> None:
    found = regions(torch.full((3, 4, 5), 2.0), keep=0.2, top=2, backend=backend)
    assert found.reason == "the saliency is constant" and bool(found.mask.all()) and found.mask.shape == (3, 4, 5)
    assert found.box == (0, 0, 0, 5, 4, 3)


@pytest.mark.parametrize(
    ("shape", "connectivity", "message"),
    [
        ((4, 5), 6, r"connectivity: expected one of 4, 8 for an image \[H, W\], got int 6"),
        ((4, 5), True, r"connectivity: expected one of 4, 8 for an image \[H, W\], got bool True"),
        ((2, 4, 5), 4, r"connectivity: expected one of 6, 26 for frames \[F, H, W\], where 4 and 8 .*, got int 4"),
        ((2, 4, 5), 8, "connectivity: expected one of 6, 26"),
        ((2, 4, 5), 6.0, "connectivity: expected one of 6, 26"),
        ((1, 2, 4, 5), None, r"saliency: expected shape \[H, W\]"),
    ],
)
def test_another_connectivity_is_refused(shape: tuple[int, ...], connectivity: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regions(torch.rand(shape), keep=0.2, top=2, connectivity=connectivity)


def test_nan_in_any_frame_is_refused() -> None:
    values = torch.rand(3, 4, 5)
    values[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="saliency: expected no NaN, got 1"):
        regions(values, keep=0.2, top=2)
