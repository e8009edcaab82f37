"""The values that the layers of the package pass to each other: layouts, captures, regions.

Letters, one meaning each: B batch, A query heads, KV key heads, R captured rows, S keys, D head size, L layers,
T steps, N visual tokens, GH GW grid, H W pixels. A size is (height, width); a box is (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch

from carve_kernels import checks, deprecation

Box = tuple[float, float, float, float]
Size = tuple[int, int]
RowsSpec = str | int | Sequence[int] | tuple[str, str | Sequence[str]] | Sequence[str | Sequence[int] | tuple[str, str]]
"""Which rows of a prompt are captured; see `capture_attention`."""
HeadsSpec = Literal["mean", "each"]
ViewKind = Literal["base", "tile", "crop", "frame"]

# More of a text does not help to recognise it.
_LONGEST_FACT = 120

# In the orders of carve::Normalize and carve::Score.
NORMALIZE = ("none", "sum", "max", "minmax")
SCORES = ("sum", "mean", "max")
TOO_SMALL = "every region has fewer than min_size pixels"


def brief(value: object, **facts: object) -> str:
    """A `repr` in one line: the class and some facts, tensors by dtype and shape, images by size."""
    return f"{type(value).__name__}({', '.join(f'{name}={_short(fact)}' for name, fact in facts.items())})"


def _short(fact: object) -> str:
    if isinstance(fact, torch.Tensor):
        return f"{str(fact.dtype).removeprefix('torch.')} {list(fact.shape)}"
    if isinstance(fact, Sequence) and not isinstance(fact, (str, tuple)):
        return f"[{', '.join(map(_short, fact))}]"
    # Pillow may not be installed.
    size = getattr(fact, "size", None)
    if hasattr(fact, "mode") and isinstance(size, tuple):
        return f"<{size[0]} x {size[1]} pixels>"
    text = f"{fact:.3g}" if isinstance(fact, float) else repr(fact)
    return text if len(text) <= _LONGEST_FACT else f"{text[: _LONGEST_FACT - 3]}..."


@dataclass(frozen=True)
class View:
    """One rectangle of visual tokens: their positions in the sequence, and the part of an image that they show.

    ======  ======  =========  ==================================================================
    name    dtype   shape      meaning
    ======  ======  =========  ==================================================================
    tokens  int32   [GH * GW]  positions in the token sequence, row-major over the grid
    grid    int     (GH, GW)   rows and columns of tokens
    box     float   4          the part of the upright original under the grid, in pixels; it may reach into padding
    image   int                number of the image or video in its row of the batch
    frame   int     2 or None  first and one past the last frame, for video, among the frames that the model is shown
    seconds float   2 or None  when these frames begin and end in the video, where that is known
    kind    str                "base", "tile", "crop" or "frame"
    ======  ======  =========  ==================================================================
    """

    tokens: torch.Tensor
    grid: Size
    box: Box
    image: int = 0
    frame: tuple[int, int] | None = None
    kind: ViewKind = "base"
    seconds: tuple[float, float] | None = None

    def __repr__(self) -> str:
        facts = {"tokens": self.tokens, "grid": self.grid, "box": self.box, "image": self.image, "kind": self.kind}
        times = {"frame": self.frame, "seconds": self.seconds}
        return brief(self, **facts, **{name: value for name, value in times.items() if value is not None})

    def __post_init__(self) -> None:
        checks.tensor("tokens", self.tokens, shape=("GH * GW",), dtypes=(torch.int32, torch.int64))
        rows, columns = checks.size("grid", self.grid)
        if self.tokens.numel() != rows * columns:
            raise ValueError(
                f"tokens, grid: expected {rows} x {columns} = {rows * columns} positions for the grid, "
                f"got {self.tokens.numel()}"
            )
        checks.numbers("box", self.box, ("x0", "y0", "x1", "y1"), checks.number)
        checks.integer("image", self.image, low=0)
        if self.frame is not None:
            checks.numbers("frame", self.frame, ("first", "one past the last"), checks.integer)
        checks.choice("kind", self.kind, get_args(ViewKind))
        if self.seconds is not None:
            checks.numbers("seconds", self.seconds, ("begin", "end"), checks.number)


@dataclass(frozen=True)
class VisualLayout:
    """The positions of the visual tokens of a batch: the views of each row, and the sizes of its images.

    `sizes` has the (height, width) of each image, of a video those of its frames. `measured` says that the boxes were
    measured for a family that has no layout.
    """

    views: tuple[tuple[View, ...], ...]
    sizes: tuple[tuple[Size, ...], ...]
    measured: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.views, (tuple, list)) or not all(isinstance(row, (tuple, list)) for row in self.views):
            raise TypeError(f"views: expected a tuple of views for each row, got {checks.describe(self.views)}")
        for index, row in enumerate(self.views):
            for each in row:
                if not isinstance(each, View):
                    raise TypeError(f"views[{index}]: expected views, got {checks.describe(each)} among them")
        if not isinstance(self.sizes, (tuple, list)):
            raise TypeError(f"sizes: expected a tuple of sizes for each row, got {checks.describe(self.sizes)}")
        if len(self.sizes) != len(self.views):
            raise ValueError(
                f"views, sizes: expected as many rows, got {len(self.views)} and {len(self.sizes)} of them"
            )
        for index, images in enumerate(self.sizes):
            if not isinstance(images, (tuple, list)):
                raise TypeError(
                    f"sizes[{index}]: expected a (height, width) for each image, got {checks.describe(images)}"
                )
            for image, size in enumerate(images):
                checks.size(f"sizes[{index}][{image}]", size)
        if not isinstance(self.measured, bool):
            raise TypeError(f"measured: expected True or False, got {checks.describe(self.measured)}")

    def tokens(self) -> torch.Tensor:
        """The positions of all views in order, int32 [B, N], padded with -1."""
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
        """The share of an image's area that no view covers; 0.0 where the views cover all of it."""
        height, width = self.sizes[row][image]
        boxes = [view.box for view in self.views[row] if view.image == image]
        across, down = (
            sorted({0.0, float(end), *(min(max(edge, 0.0), float(end)) for box in boxes for edge in box[axis::2])})
            for axis, end in ((0, width), (1, height))
        )
        # No view ends within one of these cells.
        cells = ((left, top, right, bottom) for left, right in pairwise(across) for top, bottom in pairwise(down))
        uncovered = [
            (right - left) * (bottom - top)
            for left, top, right, bottom in cells
            if not any(x0 <= left and y0 <= top and right <= x1 and bottom <= y1 for x0, y0, x1, y1 in boxes)
        ]
        return math.fsum(uncovered) / (height * width)


class Capture(NamedTuple):
    """What one capture returns: maps fp32 [B, R, N] (or [B, A, R, N]), mass fp32 [B, R], entropy fp32 [B, R]."""

    maps: torch.Tensor
    mass: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def empty(cls, query: torch.Tensor, tokens: torch.Tensor, heads: str) -> Capture:
        """Uninitialised outputs in float32 for a query [B, A, R, D] and tokens [B, N], on the query's device."""
        batch, query_heads, rows, _ = query.shape
        each = (query_heads,) if heads == "each" else ()
        shapes = ((batch, *each, rows, tokens.shape[1]), (batch, rows), (batch, rows))
        return cls(*(query.new_empty(shape, dtype=torch.float32) for shape in shapes))


class Given(NamedTuple):
    """The gradients of a loss with respect to the parts of a capture; None counts as zeros."""

    maps: torch.Tensor | None
    mass: torch.Tensor | None
    entropy: torch.Tensor | None

    def of_rows(self, rows: slice) -> Given:
        """Those of some rows."""
        maps, mass, entropy = self
        parts = (None if each is None else each[..., rows] for each in (mass, entropy))
        return Given(None if maps is None else maps[..., rows, :], *parts)


Gradients = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Those with respect to the query, to the key (None where they are left out) and to the sink, in their dtypes."""


class Attended(NamedTuple):
    """What one attention returns: its output [B, A, R, E] in the dtype of the query, and the capture of its rows."""

    output: torch.Tensor
    capture: Capture


class Layers(NamedTuple):
    """The captured rows, the keys and the sinks of each layer; `sink` is empty where there are none."""

    query: Sequence[torch.Tensor]
    key: Sequence[torch.Tensor]
    sink: Sequence[torch.Tensor] = ()

    @classmethod
    def single(cls, query: torch.Tensor, key: torch.Tensor, sink: torch.Tensor | None) -> Layers:
        return cls([query], [key], [] if sink is None else [sink])


class Slot(NamedTuple):
    """Where captures are written: `out`, or with a step, that step of buffers [T, M, ...] from layer `first` on."""

    out: Capture
    step: torch.Tensor | None = None
    first: int = 0


class CaptureOptions(NamedTuple):
    """The options of a capture or an attention, in one argument; `carve_kernels.capture` describes each."""

    scale: float
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    softcap: float | None = None
    window: int | None = None
    sink: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    heads: HeadsSpec = "mean"

    def of_rows(self, rows: slice) -> CaptureOptions:
        """Those of some rows."""
        mask, positions, lse = self.mask, self.positions, self.lse
        return self._replace(
            mask=None if mask is None else mask[:, :, rows],
            positions=None if positions is None else positions[:, rows],
            lse=None if lse is None else lse[:, :, rows],
        )


class ContrastOptions(NamedTuple):
    """The options of a contrast; `carve_kernels.contrast` describes each. The weights are float64 on the CPU."""

    lam: float | str
    layer_weights: torch.Tensor
    step_weights: torch.Tensor
    normalize: str


Views = Sequence[tuple[Size, Size]]
"""The grid of tokens and the size in pixels of each view of a contrast."""


class RegionOptions(NamedTuple):
    """The options of `carve_kernels.regions`, which describes each."""

    keep: float
    top: int | None = None
    floor: int | None = None
    connectivity: int = 4
    score: str = "sum"
    min_size: int = 1


@dataclass(frozen=True)
class Regions:
    """The selected regions of a saliency.

    ======  =====  ======  ==============================================================
    name    dtype  shape   meaning
    ======  =====  ======  ==============================================================
    mask    bool   [H, W]  pixels of the selected regions
    boxes   int64  [K, 4]  x0 y0 x1 y1 of each selected region, best first, x1 y1 exclusive; on the CPU
    scores  float64 [K]    score of each selected region; on the CPU
    box     int    4       union of the boxes; the whole image where no region was selected
    reason  str            why no region was selected, or None
    ======  =====  ======  ==============================================================

    Of a saliency [F, H, W] the mask is [F, H, W], and every box has six edges, x0 y0 f0 x1 y1 f1: frames f0 to f1 - 1.

    The mask is on the saliency's device. Boxes and scores are on the CPU on every device: they come with the box, so
    that reading them does not wait for the device again.
    """

    mask: torch.Tensor
    boxes: torch.Tensor
    scores: torch.Tensor
    box: tuple[int, ...]
    reason: str | None = None

    def __repr__(self) -> str:
        return brief(self, box=self.box, boxes=self.boxes.tolist(), mask=self.mask, reason=self.reason)

    @classmethod
    def whole(cls, saliency: torch.Tensor, reason: str) -> Regions:
        """No region of a saliency: the mask and the box are all of it, and the reason says why."""
        lengths = tuple(reversed(saliency.shape[-2:])) + tuple(saliency.shape[:-2])
        boxes = torch.empty(0, 2 * len(lengths), dtype=torch.int64, device="cpu")
        scores = torch.empty(0, dtype=torch.float64, device="cpu")
        box = (0,) * len(lengths) + lengths
        return cls(torch.ones_like(saliency, dtype=torch.bool), boxes, scores, box, reason)


__getattr__ = deprecation.moved_names(
    __name__, CarveResult="carve_kernels.hf.engine.result", CarveFailure="carve_kernels.hf.engine.result"
)
