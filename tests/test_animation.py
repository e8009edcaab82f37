"""Figures of a video: a strip of chosen frames and an animation, read again by Pillow."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, features

from carve_kernels.animation import animation, seconds_of, strip
from carve_kernels.types import Regions
from carve_kernels.visualize import overlay


def video(count: int = 6, size: tuple[int, int] = (96, 64)) -> tuple[list[Image.Image], torch.Tensor]:
    """Grey frames, and a spot that becomes stronger and moves to the right."""
    saliency = torch.zeros(count, size[1], size[0])
    for number in range(count):
        saliency[number, 20:40, 10 * number : 10 * number + 20] = (number + 1) / count
    return [Image.new("RGB", size, (90, 90, 90))] * count, saliency


def selected(*box: int) -> Regions:
    return Regions(torch.empty(0), torch.empty(0, 6, dtype=torch.int64), torch.empty(0), box)


def heat(figure: Image.Image) -> numpy.ndarray:
    """How far each pixel is from grey."""
    pixels = numpy.asarray(figure.convert("RGB")).astype(int)
    return pixels.max(-1) - pixels.min(-1)


def test_the_same_value_has_the_same_colour_in_every_frame() -> None:
    frames, saliency = video()
    page = strip(frames, saliency, chosen=[0, 5], seconds=[0.0, 1, 2, 3, 4, 65.04], shares=[0.1] * 6, tile=240)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("carve_kernels.animation.panel", lambda rows, **_: rows[0])
        first_tile, last_tile = strip(frames, saliency, chosen=[0, 5], shares=[0.1] * 6)
    assert (first_tile.title, last_tile.title) == ("frame 0", "frame 5")
    assert first_tile.caption == "10% of the contrast"
    # Two tiles of 240 pixels and the margins.
    assert page.width == 2 * 240 + 3 * 24
    first, last = page.crop((24, 0, 264, page.height)), page.crop((288, 0, 528, page.height))
    assert heat(last).max() > heat(first).max() > 0
    with pytest.raises(ValueError, match=r"chosen\[0\]: expected an integer from 0 to 5"):
        strip(frames, saliency, chosen=[6])
    with pytest.raises(ValueError, match="chosen: expected at least one frame"):
        strip(frames, saliency, chosen=[])


def test_a_strip_reads_the_chosen_frames_alone() -> None:
    frames, saliency = video()

    class Counted:
        def __init__(self) -> None:
            self.read: set[int] = set()

        def __getitem__(self, number: int) -> torch.Tensor:
            self.read.add(number)
            return saliency[number]

        def __len__(self) -> int:
            return len(saliency)

    counted: Any = Counted()
    strip(frames, counted, chosen=[1, 4])
    assert counted.read == {1, 4}


@pytest.mark.parametrize(
    ("second", "text"),
    [(None, ""), (0.0, "0.0 s"), (12.46, "12.5 s"), (59.94, "59.9 s"), (59.96, "1:00.0"), (65.04, "1:05.0"),
     (600.0, "10:00.0")],
)  # fmt: skip
def test_seconds_are_written_as_players_do(second: float | None, text: str) -> None:
    assert seconds_of(second) == text


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_an_animation_has_all_frames_at_their_times_and_the_box_where_it_is(suffix: str, tmp_path: Path) -> None:
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("this Pillow writes no WebP")
    frames, saliency = video()
    path = animation(
        tmp_path / f"clip.{suffix}",
        frames,
        saliency,
        regions=selected(10, 10, 2, 60, 50, 4),
        seconds=[0, 0.5, 1, 1.5, 2, 3, 3.25],
    )
    assert path == tmp_path / f"clip.{suffix}"
    with Image.open(path) as opened:
        assert opened.n_frames == 6 and opened.size == (96, 64)
        durations, boxed = [], []
        for number in range(6):
            opened.seek(number)
            opened.load()
            durations.append(opened.info["duration"])
            pixels = numpy.asarray(opened.convert("RGB")).astype(int)
            edge = pixels[10:12, 30:50].mean((0, 1))
            boxed.append(bool(edge[0] - edge[2] > 60))
    assert durations == [500, 500, 500, 500, 1000, 250]
    assert boxed == [False, False, True, True, False, False]


def test_large_frames_are_made_small(tmp_path: Path) -> None:
    frames, saliency = video(2, (960, 480))
    with Image.open(animation(tmp_path / "clip.webp", frames, saliency, longest=240)) as opened:
        assert opened.size == (240, 120)


def test_without_webp_it_is_a_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    frames, saliency = video(2)
    path = animation(tmp_path / "clip.webp", frames, saliency)
    assert path == tmp_path / "clip.gif"
    with Image.open(path) as opened:
        assert opened.format == "GIF" and opened.n_frames == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": []}, "frames: expected at least one, got none"),
        ({"saliency": video(5)[1]}, "saliency: expected one for each of 6 frames, got 5"),
        ({"seconds": [0.0, 1.0]}, "seconds: expected 7"),
        ({"seconds": [0.0] * 6}, "seconds: expected 7, .*, got 6"),
        ({"longest": 3}, "longest: expected an integer of at least 16"),
        ({"frames": ["a.png"] * 6}, r"frames\[0\]: expected a PIL image, got str"),
        (
            {"regions": selected(10, 10, 60, 50)},
            r"regions: expected those of a video, .* \(10, 10, 60, 50\) of an image",
        ),
        ({"regions": selected(0, 0, 0, 97, 64, 6)}, "regions: expected a box in 6 frames 96 wide and 64 high"),
        ({"regions": selected(0, 0, 3, 96, 64, 7)}, "regions: expected a box in 6 frames 96 wide and 64 high"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    frames, saliency = video()
    arguments: dict[str, Any] = {"frames": frames, "saliency": saliency, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        animation(tmp_path / "clip.webp", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": [0.0, 1.0]}, "seconds: expected one for each of 6 frames, got 2"),
        ({"shares": [0.5] * 5}, "shares: expected one for each of 6 frames, got 5"),
        ({"saliency": video(5)[1]}, "saliency: expected one for each of 6 frames, got 5"),
        ({"frames": []}, "frames: expected at least one, got none"),
        ({"chosen": [1.5]}, r"chosen\[0\]: expected an integer"),
    ],
)
def test_what_does_not_fit_a_strip_is_refused(changes: dict[str, Any], message: str) -> None:
    frames, saliency = video()
    arguments: dict[str, Any] = {"frames": frames, "saliency": saliency, "chosen": [5], **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        strip(**arguments)


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_figures_are_made_one_at_a_time(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, saliency = video(12)
    made: list[weakref.ref[Any]] = []
    most = 0

    def watched(*arguments: Any, **options: Any) -> Image.Image:
        nonlocal most
        figure = overlay(*arguments, **options)
        made.append(weakref.ref(figure))
        most = max(most, sum(each() is not None for each in made))
        return figure

    monkeypatch.setattr("carve_kernels.animation.overlay", watched)
    animation(tmp_path / f"clip.{suffix}", frames, saliency)
    # The writer of WebP goes back to the first one at its end.
    assert len(made) in (12, 13) and most == 1
