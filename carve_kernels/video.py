"""The contrast of a video: one saliency for each frame, computed when it is asked for; its regions and key frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Any

import torch

from carve_kernels import checks
from carve_kernels.ops.contrast import contrast
from carve_kernels.pipeline import is_flat, pair
from carve_kernels.presets import Preset
from carve_kernels.types import Box, Regions, Size, View, brief
from carve_kernels.view_pixels import combine, density, paste, rectangle, seen_pixels, select_all, widened

LONGEST = 448
"""The longer side of the frames on which regions are selected, in pixels: no model's grid has as many tokens."""

MOST_PIXELS = 2**23
"""The pixels of all frames together on which regions are selected, about: their saliency has 32 MiB."""


@dataclass(frozen=True)
class VideoSaliency:
    """The saliency of a video, from `contrast_frames`: `len()` frames, each made when it is read.

    ========  ========  ==========  ==========================================================================
    name      dtype     shape       meaning
    ========  ========  ==========  ==========================================================================
    grid      as task   [GH, GW]    for each view, the contrast of its tokens
    views     View                  where each of them is, in space and time
    size      int       (H, W)      pixels of a frame
    frames    int                   number of frames
    preset    Preset                how views are combined and regions are selected
    reason    str                   why there is no contrast, or None
    [f]       float32   [H, W]      the saliency of frame f, 0 where there is no view
    ========  ========  ==========  ==========================================================================

    Frames that share their tokens, as two do in a temporal patch of Qwen, have the same saliency. Reading one needs its
    own memory beside the grids (and that of the view where this covers it in part), `tensor()` needs that of all. A
    loop over them has two, since its variable keeps a frame while the next one is made; one with `frame(number,
    out=buffer)`.
    """

    grid: tuple[torch.Tensor, ...]
    views: tuple[View, ...]
    size: Size
    frames: int
    preset: Preset
    reason: str | None = None
    backend: str = "auto"

    def __repr__(self) -> str:
        return brief(self, frames=self.frames, size=self.size, grids=list(self.grid), reason=self.reason)

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, frame: int) -> torch.Tensor:
        return self.frame(checks.integer("frame", frame, low=-self.frames, high=self.frames - 1) % self.frames)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.frame(number) for number in range(self.frames))

    def frame(self, number: int, size: Size | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The saliency of a frame, float32 [H, W] or of another size; written into `out`, if that is given."""
        visible, shape = self._visible(number), self._shape(size)
        if out is None:
            out = torch.empty(shape, device=self._device)
        checks.tensor("out", out, shape=shape, dtypes=(torch.float32,))
        if out.device != self._device:
            raise ValueError(f"out: expected a tensor on {self._device} as the maps, got {checks.describe(out)}")
        boxes = [_scaled(self.views[index].box, self.size, shape) for index in visible]
        rectangles = [rectangle(box, shape) for box in boxes]
        grids = [self.grid[index].to(torch.float32) for index in visible]
        if rectangles == [(0, 0, shape[1], shape[0])] and out.is_contiguous():
            # Most frames have one view of all of it, whose pixels need no memory beside them.
            return widened(grids[0], shape, out)
        views = (widened(grid, (1, 1) if each is None else (each[3] - each[1], each[2] - each[0]))
                 for grid, each in zip(grids, rectangles, strict=True))  # fmt: skip
        if len(rectangles) == 1:
            return paste(next(views), rectangles[0], out)
        densities = [density(self.views[index].grid, box) for index, box in zip(visible, boxes, strict=True)]
        found = combine(views, rectangles, densities, shape, self.preset.overlap)
        return out.copy_(found) if found.numel() else out.zero_()

    def tensor(self, size: Size | None = None) -> torch.Tensor:
        """The saliency of all frames, float32 [F, H, W] or of another size."""
        found = torch.empty(self.frames, *self._shape(size), device=self._device)
        for number, values in enumerate(found):
            self.frame(number, size, out=values)
        return found

    def seen(self, size: Size | None = None) -> torch.Tensor:
        """The pixels of the frames that some view covers, bool [F, H, W] or of another size."""
        shape = self._shape(size)
        found = torch.empty(self.frames, *shape, dtype=torch.bool, device=self._device)
        for number, pixels in enumerate(found):
            boxes = (_scaled(self.views[index].box, self.size, shape) for index in self._visible(number))
            pixels.copy_(seen_pixels((rectangle(box, shape) for box in boxes), shape, self._device))
        return found

    def mass(self) -> torch.Tensor:
        """The share of each frame in the contrast of all frames, float64 [F] on the CPU; 0 where there is none."""
        found = torch.zeros(self.frames, dtype=torch.float64, device="cpu")
        for values, view in zip(self.grid, self.views, strict=True):
            left, top, right, bottom = view.box
            first, last = view.frame or (0, 0)
            found[first:last] += values.mean(dtype=torch.float32).item() * (right - left) * (bottom - top)
        total = found.sum()
        return found / total if total > 0 else found

    def key_frames(self, count: int) -> list[int]:
        """The `count` frames with the largest mass, in the order of time.

        Of frames that share their tokens it is the first: fewer than `count` where there are fewer such groups.
        """
        checks.integer("count", count, low=1)
        firsts = sorted({view.frame[0] for view in self.views if view.frame is not None})
        mass = self.mass().tolist()
        return sorted(sorted(firsts, key=lambda frame: -mass[frame])[:count])

    def regions(self, longest: int | None = None) -> Regions:
        """The regions of the video over space and time, by the preset (connectivity 4 becomes 6, and 8 becomes 26).

        They are selected on frames of `reduced_size(longest)`: the mask is [F, h, w] in these, boxes are in pixels of
        the frames themselves and reach outwards to the next whole one. `keep` is a share of the pixels that some view
        covers. All frames are in memory at once, with at most 30 bytes for each of their pixels.
        """
        size = self.reduced_size(longest)
        if self.reason is not None:
            found = Regions.whole(torch.empty(1).expand(self.frames, *size), self.reason)
        else:
            found = select_all(self.tensor(size), self.seen(size), self.preset, self.backend)
        boxes = torch.tensor([_outward(box, size, self.size) for box in found.boxes.tolist()], dtype=torch.int64)
        return replace(found, boxes=boxes.reshape(-1, 6), box=tuple(_outward(found.box, size, self.size)))

    def reduced_size(self, longest: int | None = None) -> Size:
        """The size of the frames that regions are selected on: with `longest` pixels on the longer side at most.

        None: 448, and fewer where all frames together would have more than about 2^23 pixels (`MOST_PIXELS`).
        """
        height, width = self.size
        if longest is None:
            scale = min(LONGEST / max(self.size), sqrt(MOST_PIXELS / (self.frames * height * width)))
        else:
            scale = checks.integer("longest", longest, low=1) / max(self.size)
        scale = min(1.0, scale)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def seconds(self, frame: int) -> float | None:
        """When a frame is shown in the video, where that is known."""
        view = next((self.views[index] for index in self._visible(frame)), None)
        if view is None or view.frame is None or view.seconds is None:
            return None
        (first, last), (begin, end) = view.frame, view.seconds
        return begin + (end - begin) * (frame - first) / (last - first)

    @property
    def _device(self) -> torch.device:
        return self.grid[0].device

    def _shape(self, size: Size | None) -> Size:
        return self.size if size is None else checks.size("size", size)

    def _visible(self, number: int) -> list[int]:
        """The views that show a frame."""
        return self._views_of_frames[checks.integer("frame", number, low=0, high=self.frames - 1)]

    @cached_property
    def _views_of_frames(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.frames)]
        for index, view in enumerate(self.views):
            first, last = view.frame or (0, 0)
            for views in found[first:last]:
                views.append(index)
        return found


def contrast_frames(
    task: torch.Tensor,
    general: torch.Tensor,
    views: Sequence[View],
    size: Size,
    *,
    preset: str | Preset | Mapping[str, Any] = "paper",
    backend: str = "auto",
) -> VideoSaliency:
    """Contrast the maps of a question about a video with those of a general instruction, for each of its frames.

    ========  ==================  ==========  =================================================================
    name      dtype               shape       meaning
    ========  ==================  ==========  =================================================================
    task      float32 or float64  [L, T1, N]  attention on each token of the video, by layer and step
    general   as task             [L, T2, N]  the same for the general instruction
    views     View                            the views of the video in the order of the tokens, with frames
    size      int                 (H, W)      pixels of a frame, that the boxes of the views are in
    preset    str, Preset, dict               pairing, weights, lam and normalization as in `carve`
    (result)  VideoSaliency                   `len()` frames
    ========  ==================  ==========  =================================================================

    Ratios, weights, means and normalization are those of `contrast` over all tokens of the video.

    Raises TypeError or ValueError for an argument of the wrong kind or shape, and for a view without frames.
    """
    settings = Preset.of(preset)
    checks.size("size", size)
    for name, maps in (("task", task), ("general", general)):
        checks.tensor(name, maps, shape=("L", "T", "N"), dtypes=(torch.float32, torch.float64))
    if not isinstance(views, Sequence) or not views or not all(isinstance(view, View) for view in views):
        raise TypeError(f"views: expected the views of a video, got {checks.describe(views)}")
    for index, view in enumerate(views):
        if view.frame is None or not 0 <= view.frame[0] < view.frame[1]:
            raise ValueError(f"views[{index}]: expected a view of frames of a video, got frame={view.frame}")
    count = max(view.frame[1] for view in views if view.frame is not None)
    grids = [view.grid for view in views]
    lengths = [view.tokens.numel() for view in views]
    for name, maps in (("task", task), ("general", general)):
        if maps.shape[-1] != sum(lengths):
            raise ValueError(f"{name}: expected the {sum(lengths)} tokens of the views, got {checks.describe(maps)}")
    reason = None
    if task.numel() == 0 or general.numel() == 0:
        reason = "the maps are empty"
    else:
        task, general, by_step = pair(task, general, settings.steps, step_weights=settings.step_weights)
        reason = "the saliency is constant" if is_flat(task, general, settings.lam) else None
    if reason is not None:
        values = [task.new_zeros(grid) for grid in grids]
    else:
        # On the grids themselves nothing is widened to pixels.
        values = contrast(
            task, general, grids, grids, lam=settings.lam, layer_weights=settings.layer_weights, step_weights=by_step,
            normalize=settings.normalize, backend=backend,
        )  # fmt: skip
    return VideoSaliency(tuple(values), tuple(views), (size[0], size[1]), count, settings, reason, backend)


def _scaled(box: Box, size: Size, to: Size) -> Box:
    """A box in frames of `size` as one in frames of another size."""
    across, down = to[1] / size[1], to[0] / size[0]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def _outward(box: Sequence[int], size: Size, to: Size) -> list[int]:
    """x0 y0 f0 x1 y1 f1 in frames of `size` as whole pixels of frames of another size, which it does not leave."""
    x0, y0, f0, x1, y1, f1 = box
    # In integers: a float may be a rounding above a whole pixel.
    low = (x0 * to[1] // size[1], y0 * to[0] // size[0])
    high = (-(-x1 * to[1] // size[1]), -(-y1 * to[0] // size[0]))
    return [*low, f0, *high, f1]
