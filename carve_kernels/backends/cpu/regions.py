"""Regions by the compiled operator: selection instead of a sort, runs instead of labels."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.backends.native import region_buffers
from carve_kernels.types import SCORES, Regions


def supports(saliency: torch.Tensor, **_options: Any) -> str | None:
    """Why these arguments cannot be served, or None."""
    return region_buffers.supports(saliency)


def forward(
    saliency: torch.Tensor,
    *,
    keep: float,
    top: int | None = None,
    floor: int | None = None,
    connectivity: int = 4,
    score: str = "sum",
) -> Regions:
    """The selected regions, or the whole image and the reason; see `carve_kernels.regions`."""
    # Memory of the worst case costs nothing until it is written; the result is copied out of it.
    buffers = region_buffers.allocate(saliency, keep=keep, top=top, floor=floor, connectivity=connectivity)
    torch.ops.carve_kernels.regions_cpu(
        saliency.detach().contiguous(),
        keep,
        top or 0,
        floor or 0,
        connectivity,
        SCORES.index(score),
        *buffers,
    )
    return region_buffers.read(buffers)
