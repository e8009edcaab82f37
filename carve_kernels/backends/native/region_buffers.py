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
# In front of an outcome's rows.
_NUMBERS = 6


class RegionBuffers(NamedTuple):
    """The outputs of an operator: mask [H, W], boxes [capacity, 4] and scores [capacity] of `Regions`, for as many
    regions as may be selected, and int64: the number of regions, the reason and the box in six of them, then the first
    rows of boxes and, as bits, of scores again, as many as fit.
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


def most_selected(height: int, width: int, options: RegionOptions) -> int:
    """The largest number of regions that are selected in an image."""
    keep, top, floor, connectivity, _ = options
    most = most_regions(height, width, connectivity)
    return min(most, max(floor or 0, int(most * keep)) if top is None else top)


def numbers(options: RegionOptions) -> tuple[float, int, int, int, int]:
    """The options as an operator takes them."""
    keep, top, floor, connectivity, score = options
    return keep, top or 0, floor or 0, connectivity, SCORES.index(score)


def allocate(saliency: torch.Tensor, options: RegionOptions, *, outcome_rows: int = 0) -> RegionBuffers:
    """Outputs for as many regions as may be selected, and at most `outcome_rows` of them also in the outcome."""
    height, width = saliency.shape
    capacity = most_selected(height, width, options)
    return RegionBuffers(
        saliency.new_empty(saliency.shape, dtype=torch.bool),
        saliency.new_empty(capacity, 4, dtype=torch.int64),
        saliency.new_empty(capacity, dtype=torch.float64),
        saliency.new_empty(_NUMBERS + 5 * min(outcome_rows, capacity), dtype=torch.int64),
    )


def read(buffers: RegionBuffers) -> Regions:
    """The regions in the buffers, boxes and scores on the host.

    One copy waits for the device. Regions that are not all in the rows of the outcome take two more.
    """
    outcome = _fetch(buffers.outcome, pinned=True)
    count, reason, x0, y0, x1, y1 = outcome[:_NUMBERS].tolist()
    rows = (len(outcome) - _NUMBERS) // 5
    if count <= rows:
        # Copies: what was fetched into is the size of all rows.
        boxes = outcome[_NUMBERS : _NUMBERS + 4 * rows].view(rows, 4)[:count].clone()
        scores = outcome[_NUMBERS + 4 * rows :].view(torch.float64)[:count].clone()
    else:
        boxes, scores = _first(buffers.boxes, count), _first(buffers.scores, count)
    return Regions(buffers.mask, boxes, scores, (x0, y0, x1, y1), REASONS[reason])


def _fetch(numbers: torch.Tensor, *, pinned: bool = False) -> torch.Tensor:
    """The numbers on the host, which waits for them; `pinned`: from a GPU to memory that PyTorch keeps for reuse."""
    if numbers.device.type == "cpu":
        return numbers
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=pinned and numbers.is_cuda)
    return host.copy_(numbers)


def _first(rows: torch.Tensor, count: int) -> torch.Tensor:
    here = _fetch(rows[:count])
    # The memory of the worst case is freed where it is more than a few pages.
    return here.clone() if rows.device.type == "cpu" and len(rows) > _FEW_ROWS else here
