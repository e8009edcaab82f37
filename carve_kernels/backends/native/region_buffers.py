"""The inputs and outputs of the compiled region operators, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from carve_kernels.types import SCORES, RegionOptions, Regions

# In the order of carve::Reason. Reasons and scores are numbers: the stable ABI of torch 2.13 leaks every string.
REASONS = (
    None,
    "the saliency is empty",
    "the saliency is not finite",
    "the saliency is constant",
    "the range of the saliency is too wide for its dtype",
)
MOST_PIXELS = 2**31 - 1
_FEW_ROWS = 1024


class RegionBuffers(NamedTuple):
    """The outputs of an operator: mask [H, W], boxes [capacity, 4] and scores [capacity] of `Regions`, for as many
    regions as may be selected, and six int64: the number of regions, the reason and the box.
    """

    mask: torch.Tensor
    boxes: torch.Tensor
    scores: torch.Tensor
    outcome: torch.Tensor


def too_large(saliency: torch.Tensor) -> str | None:
    """Why a compiled operator cannot serve a saliency, or None."""
    if saliency.numel() > MOST_PIXELS:
        return f"saliency has {saliency.numel()} pixels, this backend serves {MOST_PIXELS}; use backend='reference'"
    return None


def most_regions(height: int, width: int, connectivity: int) -> int:
    """The largest number of regions of an image."""
    # Two pixels of one colour of a checkerboard are not 4-connected; every second row and column is not 8-connected.
    return (height * width + 1) // 2 if connectivity == 4 else (height + 1) // 2 * ((width + 1) // 2)


def numbers(options: RegionOptions) -> tuple[float, int, int, int, int]:
    """The options as an operator takes them."""
    keep, top, floor, connectivity, score = options
    return keep, top or 0, floor or 0, connectivity, SCORES.index(score)


def allocate(saliency: torch.Tensor, options: RegionOptions) -> RegionBuffers:
    """Outputs for as many regions as may be selected."""
    keep, top, floor, connectivity, _ = options
    height, width = saliency.shape
    most = most_regions(height, width, connectivity)
    capacity = min(most, max(floor or 0, int(most * keep)) if top is None else top)
    return RegionBuffers(
        saliency.new_empty(saliency.shape, dtype=torch.bool),
        saliency.new_empty(capacity, 4, dtype=torch.int64),
        saliency.new_empty(capacity, dtype=torch.float64),
        saliency.new_empty(6, dtype=torch.int64),
    )


def read(buffers: RegionBuffers) -> Regions:
    """The regions in the buffers. Waits for the device: the box is Python numbers."""
    count, reason, x0, y0, x1, y1 = buffers.outcome.tolist()
    return Regions(
        buffers.mask, _first(buffers.boxes, count), _first(buffers.scores, count), (x0, y0, x1, y1), REASONS[reason]
    )


def _first(rows: torch.Tensor, count: int) -> torch.Tensor:
    # The memory of the worst case is freed where it is more than a few pages.
    return rows[:count] if len(rows) <= _FEW_ROWS else rows[:count].clone()
