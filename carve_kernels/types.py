"""The values that travel between the floors: layouts, captures, maps, regions, results.

Letters, one meaning each: B batch, A query heads, KV key heads, R captured rows, S keys, D head size, L layers,
T steps, N visual tokens, GH GW grid, H W pixels. A size is (height, width); a box is (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

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
    box     float   4          part of the EXIF-transposed original that the grid covers, pixels
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


@dataclass(frozen=True)
class CarveResult:
    """What the engine found out about one image and one question.

    `entropy` holds H / ln N of the task map for each captured layer; `seconds` the time of each stage; `reason` says
    why the whole image was kept, or is None. `answer` is empty where no plain answer was wanted. `complexity` is
    measured when it is first read: that takes as long as a tenth of an answer, and few ask for it.
    """

    question: str
    prompt: str
    answer: str
    refined_answer: str
    image: Image
    refined: Image
    task: Any
    general: Any
    saliency: torch.Tensor
    regions: Regions
    entropy: dict[int, float]
    seconds: dict[str, float]
    preset: Any
    measure: Callable[[Image], dict[str, float]] = field(repr=False)
    reason: str | None = None
    answer_ids: tuple[int, ...] = field(default=(), repr=False)
    refined_ids: tuple[int, ...] = field(default=(), repr=False)
    unseen: float = 0.0

    @cached_property
    def complexity(self) -> dict[str, float]:
        """How much there is in the image: "edges" and "colours", each from 0 to 1."""
        return self.measure(self.image)

    @property
    def error(self) -> None:
        """No error: what stands here in a batch where a picture or a question could not be used is a CarveFailure."""
        return None

    @property
    def mask(self) -> torch.Tensor:
        return self.regions.mask

    @property
    def boxes(self) -> torch.Tensor:
        return self.regions.boxes

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.regions.box


@dataclass(frozen=True)
class CarveFailure:
    """What a batch has in place of a CarveResult for a picture or a question that could not be used.

    `image` is the path or the picture as it was given; `error` is what asking it alone would have raised.
    """

    question: str
    image: Any
    error: Exception
    prompt: str | None = None
