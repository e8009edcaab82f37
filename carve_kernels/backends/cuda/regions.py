"""Regions on the device: radix selection, union-find over runs, sums by integer atomics, merge sort."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.backends.cuda import foreign, stream_of
from carve_kernels.backends.cuda.plan import MOST_BLOCKS
from carve_kernels.backends.native import region_buffers
from carve_kernels.types import SCORES, Regions

# Histograms of 2^11 bins for six passes and some numbers; 40 bytes for each possible region, 4 for each pixel.
_STATE_BYTES = 6 * 2**11 * 4 + 104
_REGION_BYTES = 40
_PIXEL_BYTES = 4


def supports(saliency: torch.Tensor, **_options: Any) -> str | None:
    """Why these arguments cannot be served, or None."""
    reason = region_buffers.supports(saliency)
    return reason or (foreign(saliency.device.index) if saliency.device.type == "cuda" else None)


def forward(
    saliency: torch.Tensor,
    *,
    keep: float,
    top: int | None = None,
    floor: int | None = None,
    connectivity: int = 4,
    score: str = "sum",
) -> Regions:
    """The selected regions, or the whole image and the reason; see `carve_kernels.regions`.

    Mask, boxes and scores stay on the device. One copy of six numbers to the host, for the union box and the reason,
    waits for the device at the end. Scratch takes 4 bytes a pixel and 40 for each region that an image of this size can
    have, in all 24 bytes a pixel (14 with 8-connectivity).
    """
    saliency = saliency.detach().contiguous()
    height, width = saliency.shape
    buffers = region_buffers.allocate(saliency, keep=keep, top=top, floor=floor, connectivity=connectivity)
    torch.ops.carve_kernels.regions_cuda(
        saliency,
        keep,
        top or 0,
        floor or 0,
        connectivity,
        SCORES.index(score),
        MOST_BLOCKS,
        stream_of(saliency.device),
        saliency.new_empty(scratch_bytes(height, width, connectivity), dtype=torch.uint8),
        *buffers,
    )
    return region_buffers.read(buffers)


def scratch_bytes(height: int, width: int, connectivity: int) -> int:
    """The bytes of the operator's scratch."""
    regions = region_buffers.most_regions(height, width, connectivity)
    return _STATE_BYTES + _REGION_BYTES * regions + _PIXEL_BYTES * height * width
