"""The contrast of a video: one saliency for each frame, computed when it is asked for; its regions and key frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from carve_kernels import checks
from carve_kernels.ops.contrast import contrast
from carve_kernels.pipeline import is_flat, pair
from carve_kernels.presets import Preset
from carve_kernels.types import Box, Regions, Size, View
from carve_kernels.view_pixels import combine, density, rectangle, seen_pixels, select_all

LONGEST = 448
"""The longer side of the frames on which regions are selected, in pixels: of larger ones all would not fit in memory,
and no model's grid has as many tokens.
"""


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

    Frames that share their tokens, as two do in a temporal patch of Qwen, have the same saliency. Iterating needs the
    memory of one frame, `tensor()` that of all.
    """

    grid: tuple[torch.Tensor, ...]
    views: tuple[View, ...]
    size: Size
    frames: int
    preset: Preset
    reason: str | None = None
    backend: str = "auto"

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, frame: int) -> torch.Tensor:
        number = checks.integer("frame", frame, low=-self.frames, high=self.frames - 1)
        return self.frame(number % self.frames)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.frame(number) for number in range(self.frames))

    def frame(self, number: int, size: Size | None = None) -> torch.Tensor:
        """The saliency of a frame, float32 [H, W] or of another size."""
        height, width = size or self.size
        visible = self._visible(number)
        boxes = [_scaled(self.views[index].box, self.size, (height, width)) for index in visible]
        rectangles = [rectangle(box, (height, width)) for box in boxes]
        # The ratio of a map to 0 + 1 is the map: the views are widened to pixels as in every contrast.
        pixels = (
            contrast(
                self.grid[index].reshape(1, 1, -1), torch.zeros_like(self.grid[index]).reshape(1, 1, -1),
                self.views[index].grid, (1, 1) if each is None else (each[3] - each[1], each[2] - each[0]),
                lam=1.0, step_weights=[1.0], backend=self.backend,
            )
            for index, each in zip(visible, rectangles, strict=True)
        )  # fmt: skip
        if rectangles == [(0, 0, width, height)]:
            # Most frames have one view of all of it, whose pixels need no memory beside them.
            return next(pixels).to(torch.float32)
        densities = [density(self.views[index].grid, box) for index, box in zip(visible, boxes, strict=True)]
        found = combine(pixels, rectangles, densities, (height, width), self.preset.overlap)
        return (found if found.numel() else torch.zeros(height, width, device=self._device)).to(torch.float32)

    def tensor(self, size: Size | None = None) -> torch.Tensor:
        """The saliency of all frames, float32 [F, H, W] or of another size."""
        found = torch.empty(self.frames, *(size or self.size), device=self._device)
        for number, values in enumerate(found):
            values.copy_(self.frame(number, size))
        return found

    def seen(self, size: Size | None = None) -> torch.Tensor:
        """The pixels of the frames that some view covers, bool [F, H, W] or of another size."""
        shape = size or self.size
        boxes = ([_scaled(self.views[index].box, self.size, shape) for index in self._visible(number)]
                 for number in range(self.frames))  # fmt: skip
        return torch.stack(
            [seen_pixels([rectangle(box, shape) for box in each], shape, self._device) for each in boxes]
        )

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

    def regions(self, longest: int = LONGEST) -> Regions:
        """The regions of the video over space and time, by the preset (connectivity 4 becomes 6, and 8 becomes 26).

        They are selected on frames of at most `longest` pixels on their longer side: the mask is [F, h, w] in these,
        boxes are in pixels of the frames themselves and reach outwards to the next whole one. `keep` is a share of the
        pixels that some view covers.
        """
        size = self.reduced_size(longest)
        if self.reason is not None:
            found = Regions.whole(torch.empty(1).expand(self.frames, *size), self.reason)
        else:
            found = select_all(self.tensor(size), self.seen(size), self.preset, self.backend)
        boxes = torch.tensor([_outward(box, size, self.size) for box in found.boxes.tolist()], dtype=torch.int64)
        return replace(found, boxes=boxes.reshape(-1, 6), box=tuple(_outward(found.box, size, self.size)))

    def reduced_size(self, longest: int = LONGEST) -> Size:
        """The size of the frames that regions are selected on."""
        scale = min(1.0, checks.integer("longest", longest, low=1) / max(self.size))
        return max(1, round(self.size[0] * scale)), max(1, round(self.size[1] * scale))

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

    def _visible(self, number: int) -> list[int]:
        """The views that show a frame."""
        spans = [view.frame or (0, 0) for view in self.views]
        return [index for index, (first, last) in enumerate(spans) if first <= number < last]


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
