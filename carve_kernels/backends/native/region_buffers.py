"""The inputs and outputs of the compiled region operators, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from carve_kernels.types import SCORES, TOO_SMALL, RegionOptions, Regions

# In the order of carve::Reason. Reasons and scores are numbers: the stable ABI of torch 2.13 leaks every string.
REASONS = (
    None,
    "the saliency is empty",
    "the saliency is not finite",
    "the saliency is constant",
    "the range of the saliency is too wide for its dtype",
    TOO_SMALL,
)
MOST_PIXELS = 2**31 - 1
# Of an integer of an operator.
_LARGEST = 2**63 - 1
_FEW_ROWS = 1024
# In front of the box of an outcome.
_NUMBERS = 2


class RegionBuffers(NamedTuple):
    """The outputs of an operator: mask, boxes [capacity, 4] (6 over frames) and scores [capacity] of `Regions`, for as
    many regions as may be selected, and int64: the number of regions, the reason and the box, then the first rows of
    boxes and, as bits, of scores again, as many as fit.
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


def most_regions(shape: Sequence[int], connectivity: int) -> int:
    """The largest number of regions of a saliency of a shape."""
    # Pixels of one colour of a checkerboard touch over corners alone; every second frame, row and column does not.
    if connectivity in (4, 6):
        return (math.prod(shape) + 1) // 2
    return math.prod((length + 1) // 2 for length in shape)


def most_selected(shape: Sequence[int], options: RegionOptions) -> int:
    """The largest number of regions that are selected in a saliency of a shape."""
    keep, top, floor, connectivity, _, min_size = options
    most = min(most_regions(shape, connectivity), math.prod(shape) // min_size)
    return min(most, max(floor or 0, int(most * keep)) if top is None else top)


def numbers(options: RegionOptions) -> tuple[float, int, int, int, int, int]:
    """The options as an operator takes them."""
    keep, top, floor, connectivity, score, min_size = options
    top, floor, min_size = (min(count or 0, _LARGEST) for count in (top, floor, min_size))
    return keep, top, floor, connectivity, SCORES.index(score), min_size


def allocate(saliency: torch.Tensor, options: RegionOptions, *, outcome_rows: int = 0) -> RegionBuffers:
    """Outputs for as many regions as may be selected, and at most `outcome_rows` of them also in the outcome."""
    capacity = most_selected(saliency.shape, options)
    edges = 2 * saliency.dim()
    return RegionBuffers(
        saliency.new_empty(saliency.shape, dtype=torch.bool),
        saliency.new_empty(capacity, edges, dtype=torch.int64),
        saliency.new_empty(capacity, dtype=torch.float64),
        saliency.new_empty(_NUMBERS + edges + (edges + 1) * min(outcome_rows, capacity), dtype=torch.int64),
    )


def read(buffers: RegionBuffers) -> Regions:
    """The regions in the buffers, boxes and scores on the host.

    One copy waits for the device. Regions that are not all in the rows of the outcome take two more.
    """
    outcome = _fetch(buffers.outcome, pinned=True)
    edges = buffers.boxes.shape[1]
    count, reason, *box = outcome[: _NUMBERS + edges].tolist()
    listed = outcome[_NUMBERS + edges :]
    rows = len(listed) // (edges + 1)
    if count <= rows:
        # Copies: what was fetched into is the size of all rows.
        boxes = listed[: edges * rows].view(rows, edges)[:count].clone()
        scores = listed[edges * rows :].view(torch.float64)[:count].clone()
    else:
        boxes, scores = _first(buffers.boxes, count), _first(buffers.scores, count)
    return Regions(buffers.mask, boxes, scores, tuple(box), REASONS[reason])


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
