"""The contrast of a video: frames as images, the memory of one frame, key frames, regions over time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.support.memory import peak_of_tensors
from carve_kernels import Preset, contrast, regions
from carve_kernels.pipeline import pair
from carve_kernels.types import View
from carve_kernels.video import VideoSaliency, contrast_frames
from tests.support.planted_maps import maps

PRESET = Preset.paper(lam=0.01)
GRID, SIZE = (5, 7), (61, 83)


def views(frames: int, patch: int = 2, grid: tuple[int, int] = GRID, size: tuple[int, int] = SIZE) -> list[View]:
    """A view for each `patch` frames of a video, the last of those that are left, with half a second a frame."""
    each = grid[0] * grid[1]
    return [
        View(
            torch.arange(each, dtype=torch.int32) + number * each, grid, (0.0, 0.0, float(size[1]), float(size[0])),
            frame=(first, min(first + patch, frames)), kind="frame",
            seconds=(first / 2, min(first + patch, frames) / 2),
        )
        for number, first in enumerate(range(0, frames, patch))
    ]  # fmt: skip


def planted(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return maps((count, GRID[0] * GRID[1]), layers=3, steps=4, seed=seed)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("frames", "patch"), [(1, 2), (6, 2), (7, 2), (4, 1)])
@pytest.mark.parametrize("settings", [{}, {"normalize": "minmax"}, {"lam": "mean", "layer_weights": (1.0, 0.5, 2.0)}])
def test_a_frame_is_the_contrast_of_its_tokens(frames: int, patch: int, backend: str, settings: Any) -> None:
    of_frames = views(frames, patch)
    task, general = planted(len(of_frames))
    preset = replace(PRESET, **settings)
    found = contrast_frames(task, general, of_frames, SIZE, preset=preset, backend=backend)
    first, second, by_step = pair(task, general, preset.steps, step_weights=preset.step_weights)
    wanted = contrast(
        first, second, [GRID] * len(of_frames), [SIZE] * len(of_frames), lam=preset.lam, normalize=preset.normalize,
        layer_weights=preset.layer_weights, step_weights=by_step, backend=backend,
    )  # fmt: skip
    assert len(found) == frames and found.reason is None
    for number, values in enumerate(found):
        # The tokens of a frame are rounded to float32 before they are widened to pixels, by torch.
        assert values.dtype == torch.float32
        right = wanted[number // patch]
        torch.testing.assert_close(values, right, rtol=2e-6, atol=2e-6 * float(right.max()))
    assert torch.equal(found.tensor(), torch.stack(list(found))) and torch.equal(found[-1], found[frames - 1])
    assert found.seconds(frames - 1) == (frames - 1) / 2
    with pytest.raises(ValueError, match="frame: expected an integer"):
        found[frames]


def test_views_of_a_part_leave_the_rest_unseen() -> None:
    # Tiles side by side, one of which reaches into padding, and nothing on the right edge.
    of_frames = views(2)
    boxes = [(-10.0, 0.0, 40.0, 61.0), (40.0, 0.0, 70.0, 61.0)]
    of_frames = [replace(of_frames[0], box=box) for box in boxes]
    task, general = planted(2)
    found = contrast_frames(task, general, of_frames, SIZE, preset=PRESET)
    assert bool((found[0][:, 70:] == 0).all()) and bool((found[0][:, :70] > 0).any())
    assert found.seen()[0].sum() == 70 * 61
    selected = found.regions()
    assert not bool(selected.mask[:, :, 70:].any())
    assert selected.reason is None and selected.box[3] <= 70


def test_a_frame_and_a_loop_with_a_buffer_need_the_memory_of_one_frame() -> None:
    size, of_frames = (600, 800), views(32, 1, size=(600, 800))
    task, general = planted(32)
    pixels, slack = size[0] * size[1] * 4, 2**16
    found = contrast_frames(task, general, of_frames, size, preset=PRESET)

    def iterate() -> None:
        for values in found:
            assert values.shape == size

    def fill() -> None:
        buffer = torch.empty(size)
        for number in range(len(found)):
            assert found.frame(number, out=buffer) is buffer

    for dtype in (torch.float32, torch.float64):
        of_dtype = replace(found, grid=tuple(values.to(dtype) for values in found.grid))
        assert peak_of_tensors(lambda: of_dtype[3]) <= pixels + slack  # noqa: B023
    assert peak_of_tensors(fill) <= pixels + slack
    # A frame, and the one before it that the variable of the loop holds.
    assert peak_of_tensors(iterate) <= 2 * pixels + slack
    assert peak_of_tensors(lambda: contrast_frames(task, general, of_frames, size, preset=PRESET)) <= 4 * task.nbytes
    assert 32 * pixels <= peak_of_tensors(found.tensor) <= 32 * pixels + slack
    half = tuple(replace(view, box=(0.0, 0.0, 400.0, 600.0)) for view in of_frames)
    assert peak_of_tensors(lambda: replace(found, views=half)[3]) <= pixels * 3 / 2 + slack


def test_a_buffer_is_filled_wherever_views_are() -> None:
    of_frames = views(4, 1)
    boxes = [(0.0, 0.0, 83.0, 61.0), (-9.0, -4.0, 90.0, 70.0), (10.0, 7.0, 40.0, 61.0), (83.0, 0.0, 99.0, 61.0)]
    of_frames = [replace(view, box=box) for view, box in zip(of_frames, boxes, strict=True)]
    of_frames.append(replace(of_frames[2], box=(30.0, 7.0, 83.0, 61.0)))
    found = contrast_frames(*planted(5), of_frames, SIZE, preset=PRESET)
    for number in range(4):
        for size in (SIZE, (20, 31)):
            turned = torch.full((size[1], size[0]), -1.0).T
            for buffer in (torch.full(size, -1.0), turned):
                assert found.frame(number, size, out=buffer) is buffer
                assert torch.equal(buffer, found.frame(number, size)) and bool((buffer >= 0).all())
    assert not found[3].any() and found[2].any()
    with pytest.raises(ValueError, match="out: expected shape"):
        found.frame(0, out=torch.empty(3, 4))
    with pytest.raises(TypeError, match="out: expected dtype"):
        found.frame(0, out=torch.empty(SIZE, dtype=torch.float64))


@pytest.mark.parametrize("frames", [4, 400])
def test_regions_have_a_stated_memory(frames: int) -> None:
    of_frames = views(frames, 1, size=(1080, 1920))
    found = contrast_frames(*planted(frames), of_frames, (1080, 1920), preset=PRESET)
    height, width = found.reduced_size()
    assert (height, width) == ((252, 448) if frames == 4 else (109, 193))
    assert frames * height * width <= 1.01 * 2**23
    assert peak_of_tensors(found.regions) <= 7 * frames * height * width + 2**20


def test_key_frames_have_the_largest_mass_and_are_in_the_order_of_time() -> None:
    of_frames = views(8)
    grid = tuple(torch.full(GRID, value) for value in (1.0, 4.0, 0.5, 3.0))
    found = VideoSaliency(grid, tuple(of_frames), SIZE, 8, PRESET)
    torch.testing.assert_close(found.mass(), torch.tensor([1, 1, 4, 4, 0.5, 0.5, 3, 3], dtype=torch.float64) / 17)
    assert found.key_frames(1) == [2] and found.key_frames(2) == [2, 6] and found.key_frames(3) == [0, 2, 6]
    # Two frames of one view are one moment.
    assert found.key_frames(99) == [0, 2, 4, 6]
    pixels = torch.stack(list(found)).double().sum((1, 2))
    torch.testing.assert_close(found.mass(), pixels / pixels.sum())


def test_regions_go_on_through_frames_at_a_documented_resolution() -> None:
    of_frames = views(8)
    grid = [torch.full(GRID, 0.01) for _ in of_frames]
    for values, (row, column) in zip(grid[1:3], ((1, 2), (2, 2)), strict=True):
        values[row, column] = 1.0
    found = VideoSaliency(tuple(grid), tuple(of_frames), SIZE, 8, replace(PRESET, keep=0.02, top=1))
    plain = regions(found.tensor(), keep=0.02, top=1)
    selected = found.regions()
    assert torch.equal(selected.mask, plain.mask) and selected.box == plain.box
    assert (selected.box[2], selected.box[5]) == (2, 6)
    small = found.regions(longest=40)
    assert small.mask.shape == (8, *found.reduced_size(40)) == (8, 29, 40)
    x0, y0, f0, x1, y1, f1 = small.box
    assert (f0, f1) == (2, 6) and x1 <= 83 and y1 <= 61 and abs(y0 - plain.box[1]) <= 5
    # Outwards, and by no more than a pixel of the smaller frames and its rounding.
    assert x0 <= plain.box[0] + 3 and x1 >= plain.box[3] - 3 and abs(x0 - plain.box[0]) <= 5
    assert abs(y1 - plain.box[4]) <= 5 and small.boxes.tolist() == [list(small.box)]


def test_flat_and_empty_maps_give_the_reason() -> None:
    of_frames = views(3)
    task, _ = planted(2)
    for first, second, reason in ((task, task, "constant"), (task[:, :0], task, "empty")):
        found = contrast_frames(first, second, of_frames, SIZE, preset=replace(PRESET, lam=0.0))
        selected = found.regions()
        assert found.reason is not None and reason in found.reason and selected.reason == found.reason
        assert selected.box == (0, 0, 0, 83, 61, 3) and selected.boxes.shape == (0, 6)
        assert found.mass().sum() == 0 and found.key_frames(2) == [0, 2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"views": []}, TypeError, "views: expected the views of a video"),
        ({"views": [replace(views(1)[0], frame=None)]}, ValueError, r"views\[0\]: expected a view of frames"),
        ({"views": [replace(views(1)[0], frame=(2, 2))]}, ValueError, r"views\[0\]: expected a view of frames"),
        ({"views": views(4)}, ValueError, "task: expected the 70 tokens of the views"),
        ({"general": planted(3)[1]}, ValueError, "general: expected the 35 tokens of the views"),
        ({"size": (0, 3)}, ValueError, "size"),
        ({"task": torch.zeros(3, 35)}, ValueError, "task: expected shape"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    task, general = planted(1)
    arguments: dict[str, Any] = {"task": task, "general": general, "views": views(2), "size": SIZE, **changes}
    with pytest.raises(error, match=message):
        contrast_frames(**arguments, preset=PRESET)
    found = contrast_frames(task, general, views(2), SIZE, preset=PRESET)
    with pytest.raises(ValueError, match="count: expected an integer of at least 1"):
        found.key_frames(0)
    for call in (found.frame, found.seconds):
        with pytest.raises(ValueError, match="frame: expected an integer from 0 to 1, got int 99"):
            call(99)
        with pytest.raises(ValueError, match="frame: expected an integer from 0 to 1, got int -1"):
            call(-1)
    for sized in (lambda size: found.frame(0, size), found.tensor, found.seen):
        with pytest.raises(ValueError, match=r"size\[1\]: expected an integer of at least 1"):
            sized((3, 0))
    with pytest.raises(ValueError, match="longest: expected an integer of at least 1"):
        found.regions(0)
