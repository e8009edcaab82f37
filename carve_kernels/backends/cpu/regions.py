"""Regions by the compiled operator: selection instead of a sort, runs instead of labels."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.types import Regions

# In the orders of carve::Score and carve::Reason. Numbers, since the stable ABI of torch 2.13 leaks every string.
_SCORES = ("sum", "mean", "max")
_REASONS = (
    None,
    "the saliency is empty",
    "the saliency is not finite",
    "the saliency is constant",
    "the range of the saliency is too wide for its dtype",
)
_MOST_PIXELS = 2**31 - 1


def supports(saliency: torch.Tensor, **_options: Any) -> str | None:
    """Why these arguments cannot be served, or None."""
    if saliency.numel() > _MOST_PIXELS:
        return f"saliency has {saliency.numel()} pixels, this room serves {_MOST_PIXELS}; use backend='reference'"
    return None


def forward(
    saliency: torch.Tensor,
    *,
    keep: float,
    top: int | None = None,
    floor: int | None = None,
    connectivity: int = 4,
    score: str = "sum",
) -> Regions:
    """The kept regions, or the whole image and the reason; see `carve_kernels.regions`."""
    height, width = saliency.shape
    room = _most_regions(height, width, connectivity)
    room = min(room, max(floor or 0, int(room * keep)) if top is None else top)
    mask = saliency.new_empty(saliency.shape, dtype=torch.bool)
    # Memory of the worst case that is never touched costs nothing; what was written is copied out of it.
    boxes = saliency.new_empty(room, 4, dtype=torch.int64)
    scores = saliency.new_empty(room, dtype=torch.float64)
    outcome = saliency.new_empty(6, dtype=torch.int64)
    torch.ops.carve_kernels.regions_cpu(
        saliency.detach().contiguous(),
        keep,
        top or 0,
        floor or 0,
        connectivity,
        _SCORES.index(score),
        mask,
        boxes,
        scores,
        outcome,
    )
    kept, reason, x0, y0, x1, y1 = outcome.tolist()
    return Regions(mask, boxes[:kept].clone(), scores[:kept].clone(), (x0, y0, x1, y1), _REASONS[reason])


def _most_regions(height: int, width: int, connectivity: int) -> int:
    # The pixels of one colour of a checkerboard do not touch, nor do those of every second row and column.
    return (height * width + 1) // 2 if connectivity == 4 else (height + 1) // 2 * ((width + 1) // 2)
