"""The kernels of regions on a CPU: against the reference, in many thread orders, between guard bands, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carve_kernels.backends.cuda import regions as device
from carve_kernels.backends.native import region_buffers
from carve_kernels.backends.reference import regions as reference
from carve_kernels.selfcheck.cuda_work import regions_work
from carve_kernels.types import TOO_SMALL, RegionOptions, Regions
from tests.emulator import emulator
from tests.support.planted_maps import SALIENCIES, assert_same

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the emulator of CUDA needs a C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def _served() -> Iterator[None]:
    """Any test of this file may be the first one in its process."""
    with emulator.serving("regions"):
        yield


SHAPES = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 80)),
    st.sampled_from([(1, 1), (1, 255), (1, 257), (256, 1), (2049, 1), (3, 700), (61, 83)]),
)


def spiral(side: int) -> torch.Tensor:
    """One arm of width 1 from the corner to the middle: the longest path to a root."""
    found = torch.zeros(side, side)
    y, x, turn = 0, 0, ((0, 1), (1, 0), (0, -1), (-1, 0))
    for leg, length in enumerate([side - 1, side - 1] + [n for n in range(side - 1, 1, -2) for _ in range(2)]):
        down, right = turn[leg % 4]
        for _ in range(length):
            found[y, x] = 1
            y, x = y + down, x + right
    return found


def comb(rows: int, columns: int) -> torch.Tensor:
    """Teeth that meet only in the last row, so that every region is joined late."""
    found = torch.zeros(rows, columns)
    found[:, ::2] = 1
    found[-1] = 1
    return found


def checkerboard(rows: int, columns: int) -> torch.Tensor:
    """The largest number of regions, with scores that often tie."""
    found = torch.zeros(rows, columns)
    found.view(-1)[:: 2 if columns % 2 else 1] = 1
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return ((y + x) % 2 == 0) * (1 + torch.randint(0, 5, (rows, columns)) / 4)


HARD = {
    "spiral": spiral(64),
    "comb": comb(40, 81),
    "comb upside down": comb(40, 81).flip(0),
    "comb on its side": comb(40, 81).T.contiguous(),
    "checkerboard": checkerboard(61, 67),
    "rows": torch.arange(48.0).remainder(2)[:, None].repeat(1, 90),
    "one bright pixel": torch.zeros(50, 60).index_put((torch.tensor(30), torch.tensor(59)), torch.tensor(1.0)),
}


def share_above(values: torch.Tensor) -> float:
    """A value of `keep` for which the threshold is the least positive value."""
    return float((values > 0).double().mean()) if bool((values == 0).any()) else 1.0


def check(values: torch.Tensor, options: dict[str, Any], order: str, resident: int, seed: int) -> None:
    """That threads in some order find what the reference finds."""
    with emulator.running("regions", order, resident=resident, seed=seed):
        found = device.forward(values, RegionOptions(**options))
    assert_same(found, reference.forward(values, RegionOptions(**options)))


def check_hard(values: torch.Tensor, connectivity: int, order: str) -> None:
    """The same of all that is above the least value, which must leave some regions out."""
    options: dict[str, Any] = {"keep": share_above(values), "floor": 3, "connectivity": connectivity}
    wanted = reference.forward(values, RegionOptions(**options))
    assert wanted.reason is None and not bool(wanted.mask.all())
    for seed in (1, 2):
        check(values, options, order, 1 if order == "forward" else 4 * seed, seed)


MIN_SIZES = st.sampled_from([1, 1, 2, 3, 12, 2**31, 2**80])
DRAWN: dict[str, Any] = {
    "saliency": st.sampled_from(sorted(SALIENCIES)),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "score": st.sampled_from(["sum", "mean", "max"]),
    "order": st.sampled_from(emulator.ORDERS),
    "resident": st.integers(1, 6),
    "seed": st.integers(1, 999),
}


def check_drawn(
    shape: tuple[int, ...], saliency: str, dtype: torch.dtype, order: str, resident: int, seed: int, **options: Any
) -> None:
    noise = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    options |= options.pop("limit")
    check(SALIENCIES[saliency](noise), options, order, resident, seed)


@settings(max_examples=40)
@given(
    shape=SHAPES,
    keep=st.one_of(st.sampled_from([0.05, 0.2, 0.4, 0.5, 1.0, 1e-17]), st.floats(1e-6, 1.0)),
    limit=st.sampled_from([{"top": 1}, {"top": 3}, {"top": 10**9}, {"floor": 1}, {"floor": 3}, {"floor": 10**9}]),
    min_size=MIN_SIZES,
    connectivity=st.sampled_from([4, 8]),
    **DRAWN,
)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_any_order_of_threads_finds_what_the_reference_finds(**drawn: Any) -> None:
    check_drawn(**drawn)


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 70), st.integers(1, 40)),
    keep=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    limit=st.sampled_from([{"top": 1}, {"top": 10**9}, {"floor": 3}]),
    min_size=MIN_SIZES,
    connectivity=st.sampled_from([6, 26]),
    **DRAWN,
)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_any_order_of_threads_finds_the_same_over_frames(**drawn: Any) -> None:
    check_drawn(**drawn)


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("image", HARD)
@pytest.mark.parametrize("connectivity", [4, 8])
def test_hard_images(image: str, connectivity: int, order: str) -> None:
    check_hard(HARD[image], connectivity, order)


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("connectivity", [6, 26])
def test_regions_that_are_joined_late_over_frames(connectivity: int, order: str) -> None:
    # Frames of teeth that meet in the last frame alone, and a checkerboard in space and time.
    teeth = torch.zeros(4, 37, 41)
    teeth[:, ::2, ::2] = 1
    teeth[-1] = 1
    where = torch.meshgrid(*map(torch.arange, (5, 13, 35)), indexing="ij")
    board = (sum(where) % 2 == 0) * (1 + torch.randint(0, 5, (5, 13, 35)) / 4)
    for values in (teeth, teeth.flip(0).contiguous(), board):
        check_hard(values, connectivity, order)


@pytest.mark.parametrize("score", ["sum", "mean", "max"])
@pytest.mark.parametrize(("shape", "seeds"), [((41, 53), range(6)), ((1, 4100), range(3)), ((4100, 1), range(3))])
def test_a_few_blocks_do_the_work_of_many(
    shape: tuple[int, int], seeds: range, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(shape).round(decimals=1)
    options: dict[str, Any] = {"keep": 0.4, "floor": 3, "score": score, "connectivity": 8}
    wanted = reference.forward(values, RegionOptions(**options))
    for seed in seeds:
        monkeypatch.setattr(device, "MOST_BLOCKS", 1 + seed)
        with emulator.running("regions", "shuffled", resident=8, seed=1 + seed):
            assert_same(device.forward(values, RegionOptions(**options)), wanted)


@pytest.mark.parametrize(
    ("rows", "columns", "limit"),
    [(150, 152, {"floor": 3}), (150, 153, {"top": 1900}), (513, 516, {"floor": 3}), (513, 517, {"top": 2300})],
)
def test_more_regions_than_one_block_sorts(rows: int, columns: int, limit: dict[str, int]) -> None:
    # The larger images have more runs than one launch merges.
    values = checkerboard(rows, columns)
    options: dict[str, Any] = {"keep": share_above(values), **limit}
    found = device.forward(values, RegionOptions(**options))
    assert_same(found, reference.forward(values, RegionOptions(**options)))
    kept = limit.get("top", int(rows * columns / 2 * options["keep"]))
    assert len(found.boxes) == kept > device.OUTCOME_ROWS
    assert rows * columns / 2 > (5 if rows == 150 else emulator.MOST_RUNS) * 2048


@pytest.mark.parametrize(
    ("rows", "min_size", "limit"),
    [(150, 2, {"floor": 3}), (150, 4, {"top": 1200}), (150, 5, {"top": 10**9}), (618, 3, {"floor": 3})],
)
def test_more_regions_than_one_block_sorts_and_some_of_them_small(
    rows: int, min_size: int, limit: dict[str, int]
) -> None:
    # A region of one to four pixels in each cell of 3 x 3.
    cells = torch.randint(0, 6, (rows // 3, 160), generator=torch.Generator().manual_seed(rows))
    values = torch.zeros(rows // 3 * 3, 480)
    for number, (down, right) in enumerate([(0, 0), (0, 1), (1, 1), (1, 0)]):
        values[down::3, right::3] = (1 + cells % 4 / 4) * (cells >= number)
    options = RegionOptions(keep=share_above(values), min_size=min_size, **limit)
    wanted = reference.forward(values, options)
    assert (wanted.reason == TOO_SMALL) == (min_size == 5)
    assert cells.numel() > (3 if rows == 150 else emulator.MOST_RUNS) * 2048
    assert_same(device.forward(values, options), wanted)


def call(values: torch.Tensor, buffers: region_buffers.RegionBuffers, scratch: torch.Tensor, **changes: Any) -> None:
    arguments = {"keep": 0.3, "top": 0, "floor": 3, "connectivity": 4, "score": 0, "min_size": 1}
    arguments |= {"blocks": 64, **changes}
    emulator.operators.regions_cuda(values, *arguments.values(), scratch, *buffers)


@pytest.mark.parametrize("rows", [0, 2, 999])
@pytest.mark.parametrize(("shape", "connectivity"), [((37, 41), 4), ((3, 17, 41), 6), ((3, 17, 41), 26)])
def test_nothing_outside_the_buffers_is_written(shape: tuple[int, ...], connectivity: int, rows: int) -> None:
    values = torch.randn(shape)
    options = RegionOptions(keep=0.3, floor=3, connectivity=connectivity)
    plain = region_buffers.allocate(values, options, outcome_rows=rows)
    scratch = torch.empty(device.scratch_bytes(shape, connectivity), dtype=torch.uint8)
    stores, parts = [], []
    for part in (values, scratch, *plain):
        store = torch.full((part.numel() * part.element_size() + 512,), 0xA5, dtype=torch.uint8)
        stores.append(store)
        parts.append(store[256:-256].view(part.dtype).view(part.shape))
    parts[0].copy_(values)
    buffers = region_buffers.RegionBuffers(*parts[2:])
    for min_size in (1, 3, 10**6):
        call(parts[0], buffers, parts[1], connectivity=connectivity, min_size=min_size)
        assert_same(region_buffers.read(buffers), reference.forward(values, options._replace(min_size=min_size)))
    for store in stores:
        assert bool((store[:256] == 0xA5).all()) and bool((store[-256:] == 0xA5).all())
    assert torch.equal(parts[0], values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.0}, "keep: expected a share"),
        ({"top": 1}, "top, floor: expected one of them"),
        ({"connectivity": 6}, "connectivity: expected 4 or 8"),
        ({"score": 3}, "score: expected a number"),
        ({"min_size": 0}, "min_size: expected at least 1, got 0"),
        ({"blocks": 0}, "most_blocks: expected 1 to"),
        ({"keep": 1.0}, "boxes: expected at least 10 rows"),
    ],
)
def test_the_operator_refuses_what_it_cannot_do(changes: dict[str, Any], message: str) -> None:
    values = torch.rand(4, 5)
    buffers = region_buffers.allocate(values, RegionOptions(keep=0.3, floor=3))
    with pytest.raises(RuntimeError, match=f"regions_cuda: {message}"):
        call(values, buffers, torch.empty(device.scratch_bytes((4, 5), 4), dtype=torch.uint8), **changes)


@pytest.mark.parametrize(
    ("connectivity", "name", "buffer", "message"),
    [
        (4, None, None, "connectivity: expected 6 or 26 over frames, got 4"),
        (6, "mask", torch.zeros(4, 5, dtype=torch.bool), "mask: expected 3 dimensions, got 2"),
        (6, "mask", torch.zeros(3, 4, 5, dtype=torch.bool), "mask: expected the shape of saliency"),
        (6, "boxes", torch.zeros(6, 4, dtype=torch.int64), "boxes: expected 6 numbers for each region"),
        (6, "outcome", torch.zeros(6, dtype=torch.int64), "outcome: expected 8 numbers and 7 for each of up to 6"),
    ],
)
def test_the_operator_refuses_buffers_of_an_image_for_frames(
    connectivity: int, name: str | None, buffer: torch.Tensor, message: str
) -> None:
    values = torch.rand(2, 4, 5)
    buffers = region_buffers.allocate(values, RegionOptions(keep=0.3, floor=3, connectivity=6))
    changed = buffers._replace(**{name: buffer}) if name else buffers
    scratch = torch.empty(device.scratch_bytes((2, 4, 5), 6), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        call(values, changed, scratch, connectivity=connectivity)


@pytest.mark.parametrize("numbers", [5, 7, 6 + 5 * 4])
def test_the_operator_refuses_an_outcome_of_another_size(numbers: int) -> None:
    values = torch.rand(4, 5)
    buffers = region_buffers.allocate(values, RegionOptions(keep=0.3, floor=3))
    scratch = torch.empty(device.scratch_bytes((4, 5), 4), dtype=torch.uint8)
    message = f"outcome: expected 6 numbers and 5 for each of up to 3 boxes, got {numbers}"
    with pytest.raises(RuntimeError, match=message):
        call(values, buffers._replace(outcome=torch.empty(numbers, dtype=torch.int64)), scratch)


def test_the_operator_refuses_too_little_scratch() -> None:
    values = torch.rand(4, 5)
    buffers = region_buffers.allocate(values, RegionOptions(keep=0.3, floor=3))
    scratch = torch.empty(device.scratch_bytes((4, 5), 4) + 16, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="scratch: expected at least"):
        call(values, buffers, scratch[: device.scratch_bytes((4, 5), 4) - 1])
    with pytest.raises(RuntimeError, match="scratch: expected 16-byte alignment"):
        call(values, buffers, scratch[4:])


@pytest.mark.parametrize("fail", [1, 3, 6, 10])
def test_a_failed_launch_is_an_error_with_its_name(fail: int) -> None:
    with emulator.running("regions", fail=fail), pytest.raises(RuntimeError, match=r"\w+: planted failure"):
        device.forward(torch.rand(40, 60), RegionOptions(keep=0.2, top=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "top"), [((61, 83), 2), ((150, 203), 1), ((1, 900), 2)])
def test_the_kernels_move_the_bytes_of_the_work_count(shape: tuple[int, int], top: int, dtype: torch.dtype) -> None:
    # A smooth saliency: few regions, of long runs.
    y, x = torch.meshgrid(torch.linspace(-2, 2, shape[0]), torch.linspace(-2, 2, shape[1]), indexing="ij")
    values = torch.exp(-(y**2) - x**2).to(dtype)
    emulator.counters("regions")
    found: Regions = device.forward(values, RegionOptions(keep=0.3, top=top))
    moved = emulator.counters("regions")
    predicted = regions_work(height=shape[0], width=shape[1], element_bytes=values.element_size(), keep=0.3)
    assert found.reason is None
    assert moved.launches == predicted.launches
    assert predicted.operations == 0
    assert moved.read_bytes == pytest.approx(predicted.read_bytes, rel=0.05)
    assert moved.written_bytes == pytest.approx(predicted.written_bytes, rel=0.05)
