"""The values that travel between the floors: layouts, captures, maps, regions.

Letters, one meaning each: B batch, A query heads, KV key heads, R captured rows, S keys, D head size, L layers,
T steps, N visual tokens, GH GW grid, H W pixels. A size is (height, width); a box is (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

Box = tuple[float, float, float, float]
Size = tuple[int, int]
ViewKind = Literal["base", "tile", "crop", "frame"]


@dataclass(frozen=True)
class View:
    """One rectangle of visual tokens: where they stand in the sequence and which part of which image they show.

    ======  ======  =========  ==================================================================
    name    dtype   shape      meaning
    ======  ======  =========  ==================================================================
    tokens  int32   [GH * GW]  positions in the token sequence, row-major over the grid
    grid    int     (GH, GW)   rows and columns of tokens
    box     float   4          part of the upright original under the grid, pixels; outside of it is padding
    image   int                number of the image in its row of the batch
    frame   int     2 or None  first and one past the last frame, for video
    kind    str                "base", "tile", "crop" or "frame"
    ======  ======  =========  ==================================================================
    """

    tokens: torch.Tensor
    grid: Size
    box: Box
    image: int = 0
    frame: tuple[int, int] | None = None
    kind: ViewKind = "base"

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if self.tokens.numel() != rows * columns:
            raise ValueError(
                f"tokens: expected {rows} x {columns} = {rows * columns} positions for the grid, "
                f"got {self.tokens.numel()}"
            )


@dataclass(frozen=True)
class VisualLayout:
    """Where the visual tokens of a batch are: the views of each row, and the size of each row's images."""

    views: tuple[tuple[View, ...], ...]
    sizes: tuple[tuple[Size, ...], ...]

    def tokens(self) -> torch.Tensor:
        """All views' positions side by side, int32 [B, N], padded with -1."""
        rows = [torch.cat([view.tokens for view in row]) if row else torch.empty(0) for row in self.views]
        width = max((len(row) for row in rows), default=0)
        padded = torch.full((len(rows), width), -1, dtype=torch.int32)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row.to(torch.int32)
        return padded

    def spans(self, row: int) -> tuple[slice, ...]:
        """For each view of a row, its columns in `tokens()`."""
        ends = [0]
        for view in self.views[row]:
            ends.append(ends[-1] + view.tokens.numel())
        return tuple(slice(start, end) for start, end in pairwise(ends))

    def unseen(self, row: int = 0, image: int = 0) -> float:
        """The share of the area of an image that none of its views covers, 0.0 where all of it is seen."""
        height, width = self.sizes[row][image]
        boxes = [view.box for view in self.views[row] if view.image == image]
        across, down = (
            sorted({0.0, float(end), *(min(max(edge, 0.0), float(end)) for box in boxes for edge in box[axis::2])})
            for axis, end in ((0, width), (1, height))
        )
        # No view ends within one of these cells.
        cells = ((left, top, right, bottom) for left, right in pairwise(across) for top, bottom in pairwise(down))
        missed = [
            (right - left) * (bottom - top)
            for left, top, right, bottom in cells
            if not any(x0 <= left and y0 <= top and right <= x1 and bottom <= y1 for x0, y0, x1, y1 in boxes)
        ]
        return math.fsum(missed) / (height * width)


class Capture(NamedTuple):
    """What one capture returns: maps fp32 [B, R, N] (or [B, A, R, N]), mass fp32 [B, R], entropy fp32 [B, R]."""

    maps: torch.Tensor
    mass: torch.Tensor
    entropy: torch.Tensor


def float64_device(device: torch.device) -> torch.device:
    """Where float64 goes with tensors of a device: the device itself, but the CPU for MPS, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class Regions:
    """The kept regions of a saliency.

    ======  =====  ======  ==============================================================
    name    dtype  shape   meaning
    ======  =====  ======  ==============================================================
    mask    bool   [H, W]  pixels of the kept regions
    boxes   int64  [K, 4]  x0 y0 x1 y1 of each kept region, best first, x1 y1 exclusive
    scores  float64 [K]    score of each kept region; of a saliency on MPS, which has no float64, on the CPU
    box     int    4       union of the boxes; the whole image when nothing was kept
    reason  str            why no region was kept, or None
    ======  =====  ======  ==============================================================
    """

    mask: torch.Tensor
    boxes: torch.Tensor
    scores: torch.Tensor
    box: tuple[int, int, int, int]
    reason: str | None = None
