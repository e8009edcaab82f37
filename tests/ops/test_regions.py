"""Regions: against scipy and a naive search, ties, degenerate saliencies, and errors."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from carve_kernels import BackendUnavailable, contrast, regions
from carve_kernels.types import TOO_SMALL, RegionOptions
from tests.support.planted_maps import SALIENCIES, assert_same, backends, maps, on_gpu, serving
from tests.support.scipy_regions import regions_of_scipy


@pytest.fixture(params=[*backends("regions"), *on_gpu("regions")])
def backend(request: pytest.FixtureRequest) -> str:
    return serving("regions", request.param, torch.rand(4, 4), RegionOptions(0.2, top=2))


def saliency(size: tuple[int, int] = (61, 83), seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A contrast of planted maps, with non-dense strides."""
    task, general = maps((9, 12), seed=seed)
    store = torch.full((size[0], 2 * size[1]), float("nan"), dtype=dtype)
    found = store[:, ::2]
    found.copy_(contrast(task.to(dtype), general.to(dtype), (9, 12), size, backend="reference"))
    return found


def boxes_of(labels: numpy.ndarray, selected: list[int]) -> list[list[int]]:
    found = []
    for label in selected:
        y, x = numpy.nonzero(labels == label)
        found.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [0.05, 0.2, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("score", ["sum", "mean", "max"])
def test_equals_scipy(backend: str, dtype: torch.dtype, keep: float, connectivity: int, score: str) -> None:
    values = saliency(dtype=dtype)
    found = regions(values, keep=keep, top=2, connectivity=connectivity, score=score, backend=backend)
    labels, selected, scores = regions_of_scipy(values.numpy(), keep, 2, connectivity, score)
    assert found.reason is None
    assert numpy.array_equal(found.mask.numpy(), numpy.isin(labels, selected))
    assert found.boxes.tolist() == boxes_of(labels, selected)
    numpy.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-9)
    edges = found.boxes
    assert found.box == (*edges[:, :2].amin(0).tolist(), *edges[:, 2:].amax(0).tolist())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 9), eight=st.booleans())
def test_a_naive_search_finds_the_same(data: Any, rows: int, columns: int, eight: bool) -> None:
    levels = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 8]), min_size=rows * columns, max_size=rows * columns))
    keep = data.draw(st.sampled_from([0.1, 0.2, 0.5, 1.0]))
    floor, min_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    values = torch.tensor(levels, dtype=torch.float32).reshape(rows, columns)
    if len(set(levels)) == 1:
        found = regions(values, keep=keep, floor=floor, min_size=min_size)
        assert found.reason == "the saliency is constant"
        return
    above = values.numpy() >= numpy.percentile(values.numpy(), 100 * (1 - keep))
    left = [(y, x) for y in range(rows) for x in range(columns) if above[y, x]]
    groups = []
    while left:
        group, edge = [], [left.pop(0)]
        while edge:
            y, x = edge.pop()
            group.append((y, x))
            near = [
                (b, a) for b, a in left if max(abs(b - y), abs(a - x)) == 1 and (eight or abs(b - y) + abs(a - x) == 1)
            ]
            left = [pixel for pixel in left if pixel not in near]
            edge += near
        groups.append(sorted(group))
    groups = [group for group in groups if len(group) >= min_size]
    # Sums of powers of two are exact, so that ties are exact: the first pixel decides.
    groups.sort(key=lambda group: (-sum(float(values[pixel]) for pixel in group), group[0]))
    selected = groups[: max(floor, int(len(groups) * keep))]
    found = regions(values, keep=keep, floor=floor, min_size=min_size, connectivity=8 if eight else 4)
    if not groups:
        assert found.reason == TOO_SMALL and bool(found.mask.all()) and found.box == (0, 0, columns, rows)
        assert len(found.boxes) == len(found.scores) == 0
        return
    assert [[y, x] for y, x in sorted(pixel for group in selected for pixel in group)] == found.mask.nonzero().tolist()
    assert found.scores.tolist() == [sum(float(values[pixel]) for pixel in group) for group in selected]
    firsts = [(min(y for y, _ in group), min(x for _, x in group)) for group in selected]
    assert [(box[1], box[0]) for box in found.boxes.tolist()] == firsts


LIMITS: list[dict[str, int]] = [{"top": 1}, {"top": 3}, {"top": 10**9}, {"floor": 1}, {"floor": 3}, {"floor": 10**9}]
LIMITS += [{"min_size": 1}, {"min_size": 3}, {"min_size": 4, "top": 2}, {"min_size": 2, "floor": 1}]
LIMITS += [{"min_size": 40, "top": 10**30}, {"min_size": 10**30}]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 80)),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 64), (1, 65), (65, 1), (3, 4100), (4100, 3), (300, 257)]),
)


@settings(max_examples=300, deadline=None)
@example(
    shape=(3, 4100),  # zeros of both signs
    kind="mostly zero",
    dtype=torch.float64,
    keep=0.05,
    limit={"top": 1},
    connectivity=4,
    score="sum",
    seed=4,
)
@given(
    shape=SHAPES,
    kind=st.sampled_from(sorted(SALIENCIES)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    keep=st.one_of(st.sampled_from([0.05, 0.2, 0.4, 0.5, 1.0, 1e-17]), st.floats(1e-6, 1.0)),
    limit=st.sampled_from(LIMITS),
    connectivity=st.sampled_from([4, 8]),
    score=st.sampled_from(["sum", "mean", "max"]),
    seed=st.integers(0, 999),
)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_the_compiled_backend_is_the_reference(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, keep: float, limit: Any, seed: int, **options: Any
) -> None:
    serving("regions", "cpu", torch.rand(4, 4), RegionOptions(keep, **limit, **options))
    noise = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    values = SALIENCIES[kind](noise)
    options |= {"keep": keep, "check": False, **limit}
    assert_same(regions(values, backend="cpu", **options), regions(values, backend="reference", **options))


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1)])
@pytest.mark.parametrize("kind", ["noise", "ties", "magnitudes"])
def test_very_long_saliencies(shape: tuple[int, int], kind: str) -> None:
    serving("regions", "cpu", torch.rand(4, 4), RegionOptions(0.2, top=2))
    values = SALIENCIES[kind](torch.randn(shape))
    options: dict[str, Any] = {"keep": 0.2, "floor": 3}
    assert_same(regions(values, backend="cpu", **options), regions(values, backend="reference", **options))


@pytest.mark.parametrize("kind", ["noise", "ties", "magnitudes"])
def test_any_number_of_threads_finds_the_same(kind: str, threads: Any) -> None:
    serving("regions", "cpu", torch.rand(4, 4), RegionOptions(0.2, top=2))
    values = SALIENCIES[kind](torch.randn(1603, 1511))
    wanted = regions(values, keep=0.3, floor=3, backend="cpu")
    for count in (2, 3, 5):
        threads(count)
        assert_same(regions(values, keep=0.3, floor=3, backend="cpu"), wanted)


def test_top_is_a_cap_and_floor_is_a_floor(backend: str) -> None:
    values = torch.zeros(21, 41)
    values[1::4, 1::4] = torch.rand(5, 10) + 1
    share = 50 / values.numel()
    assert len(regions(values, keep=share, top=2, backend=backend).boxes) == 2
    assert len(regions(values, keep=share, top=99, backend=backend).boxes) == 50
    assert len(regions(values, keep=share, floor=3, backend=backend).boxes) == max(3, int(50 * share))
    # The release rounds count * p down: 15 regions of 50 at p = 0.3 are more than 3.
    many = torch.rand(50, 1).repeat(1, 2)
    many[::2] = 0
    found = regions(many, keep=0.48, floor=3, backend=backend)
    _, count = ndimage.label(many.numpy() >= numpy.percentile(many.numpy(), 52.0))
    assert len(found.boxes) == int(count * 0.48) > 3


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("score", ["sum", "mean", "max"])
def test_small_regions_are_left_out(backend: str, connectivity: int, score: str) -> None:
    values = torch.randn(47, 71, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"keep": 0.4, "connectivity": connectivity, "score": score, "backend": backend}
    every = regions(values, **options, min_size=1)
    sizes = []
    for min_size, top in ((1, None), (2, None), (3, 5), (6, None), (11, 2)):
        labels, selected, scores = regions_of_scipy(values.numpy(), 0.4, top, connectivity, score, min_size)
        found = regions(values, **options, min_size=min_size, top=top)
        assert found.reason is None and len(selected) > 1
        assert numpy.array_equal(found.mask.numpy(), numpy.isin(labels, selected))
        assert found.boxes.tolist() == boxes_of(labels, selected)
        numpy.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-9)
        sizes.append(int(found.mask.sum()))
    assert len(set(sizes)) == len(sizes) and sizes[0] == int(every.mask.sum())
    # The share is of the regions that are left.
    left = len(regions(values, **options, min_size=3).boxes)
    found = regions(values, **options, min_size=3, floor=2)
    assert 2 < int(left * 0.4) == len(found.boxes) < int(len(every.boxes) * 0.4)
    assert torch.equal(found.boxes, regions(values, **options, min_size=3, top=int(left * 0.4)).boxes)


@pytest.mark.parametrize("limit", [{}, {"top": 2}, {"floor": 3}])
def test_where_every_region_is_small_the_whole_image_is_selected(backend: str, limit: dict[str, int]) -> None:
    values = torch.zeros(9, 13)
    values[2:4, 3:6] = 1
    values[7, 7] = 2
    for min_size, reason in ((6, None), (7, TOO_SMALL), (118, TOO_SMALL), (2**63, TOO_SMALL)):
        found = regions(values, keep=7 / 117, min_size=min_size, backend=backend, **limit)
        assert found.reason == reason
        assert found.boxes.tolist() == ([[3, 2, 6, 4]] if reason is None else []) == found.boxes.tolist()
        assert found.box == ((3, 2, 6, 4) if reason is None else (0, 0, 13, 9))
        assert found.mask.sum() == (6 if reason is None else 117)
    # A saliency without regions says so, whatever their size.
    assert regions(values * 0, keep=0.5, min_size=999, backend=backend).reason == "the saliency is constant"


def test_equal_scores_are_in_raster_order(backend: str) -> None:
    values = torch.zeros(9, 9)
    for y, x in [(7, 1), (1, 7), (1, 1), (4, 4)]:
        values[y, x] = 1 / 3
    found = regions(values, keep=4 / 81, top=4, backend=backend)
    assert found.boxes[:, :2].tolist() == [[1, 1], [7, 1], [4, 4], [1, 7]]


def test_many_small_values_are_not_lost_next_to_a_large_one(backend: str) -> None:
    values = torch.full((40, 40), 1e-4)
    values[:, 20] = 0
    values[0, :20] = 1.0
    values[5, 30] = 1.001
    found = regions(values, keep=0.97, top=2, score="sum", backend=backend)
    assert found.scores.tolist() == pytest.approx([20 + 780e-4, 1.001 + 759e-4], rel=1e-6)


def test_negative_values_are_allowed(backend: str) -> None:
    values = saliency() - 1000
    shifted, plain = (regions(part, keep=0.2, top=1, score="max", backend=backend) for part in (values, values + 1000))
    assert shifted.scores[0] < 0 and torch.equal(shifted.mask, plain.mask)


def test_the_lowest_value_as_threshold_selects_everything(backend: str) -> None:
    values = torch.zeros(10, 10)
    values[3, 3] = 1
    found = regions(values, keep=0.2, top=1, backend=backend)
    assert found.reason is None and found.box == (0, 0, 10, 10) and bool(found.mask.all())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (torch.zeros(5, 7), "constant"),
        (torch.full((5, 7), 3.3), "constant"),
        (torch.full((5, 7), 3.3) * (1 + 2e-7 * torch.rand(5, 7)), "constant"),
        (torch.ones(1, 1), "constant"),
        (torch.zeros(0, 7), "empty"),
        (torch.full((3, 4), float("inf")), "not finite"),
        (torch.tensor([[1.0, float("-inf")]]), "not finite"),
    ],
)
def test_a_saliency_without_regions_selects_the_whole_image(backend: str, values: torch.Tensor, reason: str) -> None:
    found = regions(values, keep=0.2, top=2, backend=backend)
    height, width = values.shape
    assert found.reason is not None and reason in found.reason
    assert bool(found.mask.all()) and found.mask.shape == values.shape and found.mask.dtype == torch.bool
    assert found.box == (0, 0, width, height) and found.boxes.shape == (0, 4) and found.scores.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"saliency": [[1.0]]}, TypeError, "saliency: expected a tensor"),
        ({"saliency": torch.rand(3)}, ValueError, "saliency: expected shape"),
        ({"saliency": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "saliency: expected dtype"),
        ({"saliency": torch.tensor([[1.0, float("nan")]])}, ValueError, "saliency: expected no NaN, got 1"),
        ({"keep": 0}, ValueError, "keep: expected a share above 0"),
        ({"keep": 1.01}, ValueError, "keep: expected a number from 0 to 1"),
        ({"keep": "0.2"}, TypeError, "keep: expected a number"),
        ({"top": None}, ValueError, "expected exactly one of them .*, or min_size without both, got top=None"),
        ({"floor": 3, "min_size": 2}, ValueError, "got top=2 and floor=3"),
        ({"min_size": 0}, ValueError, "min_size: expected an integer of at least 1, got int 0"),
        ({"min_size": 2.0}, TypeError, "min_size: expected an integer"),
        ({"min_size": True, "top": None}, TypeError, "min_size: expected an integer"),
        ({"min_size": "3"}, TypeError, "min_size: expected an integer"),
        ({"floor": 3}, ValueError, "got top=2 and floor=3"),
        ({"top": 0}, ValueError, "top: expected an integer of at least 1"),
        ({"top": None, "floor": 1.5}, TypeError, "floor: expected an integer"),
        ({"connectivity": 6}, ValueError, "connectivity: expected one of 4, 8"),
        ({"score": "area"}, ValueError, "score: expected one of"),
        ({"backend": "cuda"}, BackendUnavailable, "cuda"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        regions(**{"saliency": torch.rand(4, 4), "keep": 0.2, "top": 2, **changes})


def test_unchecked_nan_gives_no_region() -> None:
    found = regions(torch.tensor([[1.0, float("nan")]]), keep=0.5, top=1, check=False)
    assert found.reason == "the saliency is not finite"


def test_a_range_that_overflows_has_no_region(backend: str) -> None:
    extreme = torch.finfo(torch.float32).max
    with numpy.errstate(all="ignore"):
        found = regions(torch.tensor([[-extreme, extreme, -extreme, -extreme]]), keep=0.3, top=1, backend=backend)
    assert found.reason is not None and "too wide" in found.reason and bool(found.mask.all())
