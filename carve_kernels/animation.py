"""Figures of a video: a strip of its key frames, and an animation of its saliency. Pillow and numpy only."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw, features

from carve_kernels import checks
from carve_kernels.atomic_write import write_whole
from carve_kernels.types import Regions
from carve_kernels.visualize import Tile, overlay, panel


class Saliencies(Protocol):
    """A saliency [H, W] for each frame: a list of them, a tensor [F, H, W], or a `VideoSaliency`."""

    def __getitem__(self, frame: int, /) -> torch.Tensor: ...

    def __len__(self) -> int: ...


LONGEST = 480
"""The longer side of an animation's frames, in pixels."""

_BOX = (255, 196, 60)


def seconds_of(second: float | None) -> str:
    """A time as it is written under a frame: "12.5 s", or "1:05.0"; nothing where it is not known."""
    if second is None:
        return ""
    if round(second, 1) < 60:
        return f"{second:.1f} s"
    minutes, rest = divmod(round(second, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}"


def strip(
    frames: Sequence[Image.Image],
    saliency: Saliencies,
    *,
    chosen: Sequence[int],
    seconds: Sequence[float | None] = (),
    shares: Sequence[float] = (),
    title: str = "",
    caption: str = "",
    tile: int = 240,
) -> Image.Image:
    """Some frames of a video side by side, with their saliency over them and the time under each.

    `saliency` is read for the chosen frames alone. Every frame has the same colours for the same values. `seconds` and
    `shares` are those of all frames, numbered from 0: when each begins, and its part of the contrast.
    """
    _check(frames, saliency)
    for name, values in (("seconds", seconds), ("shares", shares)):
        if len(values) not in (0, len(frames)):
            raise ValueError(f"{name}: expected one for each of {len(frames)} frames, got {len(values)}")
    if not chosen:
        raise ValueError("chosen: expected at least one frame, got none")
    for index, number in enumerate(chosen):
        checks.integer(f"chosen[{index}]", number, low=0, high=len(frames) - 1)
    ends = _ends(saliency, chosen)
    tiles = []
    for number in chosen:
        facts = [
            seconds_of(seconds[number]) if seconds else "",
            f"{shares[number]:.0%} of the contrast" if shares else "",
        ]
        figure = overlay(frames[number], saliency[number], ends=ends)
        tiles.append(Tile(figure, f"frame {number}", ", ".join(filter(None, facts))))
    return panel([tiles], title=title, caption=caption, tile=tile)


def animation(
    path: str | os.PathLike[str],
    frames: Sequence[Image.Image],
    saliency: Saliencies | None = None,
    *,
    regions: Regions | None = None,
    seconds: Sequence[float] = (),
    longest: int = LONGEST,
) -> Path:
    """Write an animation of a video, with its saliency over it and the box of its regions in the frames that it has.

    It is a WebP file, or a GIF where this Pillow writes no WebP or the path ends in .gif; the path that was written is
    returned. The frames follow each other as in the video, by `seconds` (one more than frames), or five a second. They
    are made one at a time.
    """
    checks.integer("longest", longest, low=16)
    _check(frames, saliency)
    if seconds and len(seconds) != len(frames) + 1:
        raise ValueError(
            f"seconds: expected {len(frames) + 1}, when each frame begins and the last one ends, got {len(seconds)}"
        )
    box = None if regions is None or regions.reason is not None else _box_of(regions, frames)
    target = Path(checks.path("path", path))
    if target.suffix.lower() != ".gif" and not features.check("webp"):
        target = target.with_suffix(".gif")
    durations = [max(20, round(1000 * (end - begin))) for begin, end in pairwise(seconds)] or [200] * len(frames)
    ends = None if saliency is None else _ends(saliency, range(len(frames)))

    def figure_of(number: int) -> Image.Image:
        frame = frames[number]
        scale = min(1.0, longest / max(frame.size))
        size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        figure = frame.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        if saliency is not None:
            figure = overlay(figure, saliency[number], ends=ends)
        if box is not None and box[2] <= number < box[5]:
            x0, y0, x1, y1 = (edge * scale for edge in (*box[:2], *box[3:5]))
            line = max(2, round(max(size) / 200))
            ImageDraw.Draw(figure).rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_BOX, width=line)
        return figure

    options: dict[str, Any] = {"format": "GIF", "disposal": 1}
    if target.suffix.lower() != ".gif":
        options = {"format": "WEBP", "quality": 80, "method": 3}
    written = io.BytesIO()
    _Figures(len(frames), figure_of).save(written, save_all=True, duration=durations, loop=0, **options)
    write_whole(target, written.getvalue())
    return target


class _Figures(Image.Image):
    """An image with several frames for Pillow's writers, each of which is made when it is sought."""

    def __init__(self, count: int, figure_of: Callable[[int], Image.Image]) -> None:
        super().__init__()
        self.n_frames = count
        self._figure_of = figure_of
        self.seek(0)

    def seek(self, frame: int) -> None:
        if not 0 <= frame < self.n_frames:
            raise EOFError(f"frame {frame} of {self.n_frames}")
        if frame != self.tell():
            figure = self._figure_of(frame)
            self.im, self._mode, self._size, self._frame = figure.im, figure.mode, figure.size, frame

    def tell(self) -> int:
        return getattr(self, "_frame", -1)


def _check(frames: Sequence[Image.Image], saliency: Saliencies | None) -> None:
    if not frames:
        raise ValueError("frames: expected at least one, got none")
    for index, frame in enumerate(frames):
        if not isinstance(frame, Image.Image):
            raise TypeError(f"frames[{index}]: expected a PIL image, got {checks.describe(frame)}")
    if saliency is not None and len(frames) != len(saliency):
        raise ValueError(f"saliency: expected one for each of {len(frames)} frames, got {len(saliency)}")


def _box_of(regions: Regions, frames: Sequence[Image.Image]) -> tuple[int, ...]:
    """The box x0 y0 f0 x1 y1 f1 of the regions of a video. Raises ValueError for one that is not in its frames."""
    width, height = frames[0].size
    if len(regions.box) != 6:
        raise ValueError(
            f"regions: expected those of a video, with a box x0 y0 f0 x1 y1 f1, got the box {regions.box} of an image"
        )
    x0, y0, f0, x1, y1, f1 = regions.box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and 0 <= f0 < f1 <= len(frames)):
        raise ValueError(
            f"regions: expected a box in {len(frames)} frames {width} wide and {height} high, got {regions.box}"
        )
    return regions.box


def _ends(saliency: Saliencies, numbers: Sequence[int]) -> tuple[float, float]:
    """The lowest and the highest value of some frames."""
    # One after the other: a variable would keep a frame while the next one is made.
    pairs = [[value.item() for value in saliency[number].aminmax()] for number in numbers]
    return min(low for low, _ in pairs), max(high for _, high in pairs)
