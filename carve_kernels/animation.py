"""Figures of a video: a strip of its key frames, and an animation of its saliency. Pillow and numpy only."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
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

    `saliency` is read for the chosen frames alone. Every frame has the same colours for the same values. `shares` are
    those of all frames in the contrast.
    """
    if not chosen:
        raise ValueError("chosen: expected at least one frame, got none")
    for index, number in enumerate(chosen):
        checks.integer(f"chosen[{index}]", number, low=0, high=len(frames) - 1)
    ends = _ends(saliency[number] for number in chosen)
    tiles = []
    for number in chosen:
        facts = [seconds_of(seconds[number]) if seconds else "", f"{shares[number]:.0%}" if shares else ""]
        figure = overlay(frames[number], saliency[number], ends=ends)
        tiles.append(Tile(figure, f"frame {number + 1} of {len(frames)}", ", ".join(filter(None, facts))))
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
    returned. The frames follow each other as in the video, by `seconds` (one more than frames), or five a second.
    """
    checks.integer("longest", longest, low=16)
    if not frames:
        raise ValueError("frames: expected at least one, got none")
    if saliency is not None and len(frames) != len(saliency):
        raise ValueError(f"saliency: expected one for each of {len(frames)} frames, got {len(saliency)}")
    if seconds and len(seconds) != len(frames) + 1:
        raise ValueError(f"seconds: expected {len(frames) + 1}, when each frame begins and the last one ends")
    target = Path(path)
    if target.suffix.lower() != ".gif" and not features.check("webp"):
        target = target.with_suffix(".gif")
    ends = pairwise(seconds)
    durations = [max(20, round(1000 * (end - begin))) for begin, end in ends] or [200] * len(frames)
    figures = list(_animated(frames, saliency, regions, longest))
    options: dict[str, Any] = {"format": "GIF", "disposal": 1}
    if target.suffix.lower() != ".gif":
        options = {"format": "WEBP", "quality": 80, "method": 3}
    written = io.BytesIO()
    figures[0].save(written, save_all=True, append_images=figures[1:], duration=durations, loop=0, **options)
    write_whole(target, written.getvalue())
    return target


def _animated(
    frames: Sequence[Image.Image], saliency: Saliencies | None, regions: Regions | None, longest: int
) -> Iterator[Image.Image]:
    ends = None if saliency is None else _ends(saliency[number] for number in range(len(frames)))
    for number, frame in enumerate(frames):
        scale = min(1.0, longest / max(frame.size))
        size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        figure = frame.resize(size, Image.Resampling.LANCZOS)
        if saliency is not None:
            figure = overlay(figure, saliency[number], ends=ends)
        if regions is not None and regions.reason is None and regions.box[2] <= number < regions.box[5]:
            x0, y0, _, x1, y1, _ = regions.box
            line = max(2, round(max(size) / 200))
            edges = (x0 * scale, y0 * scale, max(x0 * scale, x1 * scale - 1), max(y0 * scale, y1 * scale - 1))
            ImageDraw.Draw(figure).rectangle(edges, outline=_BOX, width=line)
        yield figure


def _ends(saliencies: Iterable[torch.Tensor]) -> tuple[float, float]:
    """The lowest and the highest value of some frames."""
    pairs = [values.aminmax() for values in saliencies]
    return min(low.item() for low, _ in pairs), max(high.item() for _, high in pairs)
