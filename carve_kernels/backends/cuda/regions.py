"""Regions on the device: radix selection, union-find in tiles and then between them, integer sums, merge sort."""

from __future__ import annotations

import torch

from carve_kernels.backends import cuda
from carve_kernels.backends.cuda.plan import MOST_BLOCKS
from carve_kernels.backends.native.region_buffers import (
    RegionBuffers,
    allocate,
    most_regions,
    numbers,
    read,
    too_large,
)
from carve_kernels.types import RegionOptions, Regions

# Counters of the digits of all passes and some numbers; 52 bytes for each possible region, 4 for each pixel.
_STATE_BYTES = (2**13 + 2**11 + 4 * 2**10) * 4 + 112
_REGION_BYTES = 52
_PIXEL_BYTES = 4
# Boxes and scores that come to the host with the number of regions: 10 KB, a microsecond or two of the bus.
OUTCOME_ROWS = 256


def supports(saliency: torch.Tensor, _options: RegionOptions) -> str | None:
    """Why these arguments cannot be served, or None."""
    return too_large(saliency) or (cuda.foreign(saliency.device.index) if saliency.device.type == "cuda" else None)


def forward(saliency: torch.Tensor, options: RegionOptions) -> Regions:
    """The selected regions, or the whole image and the reason; see `carve_kernels.regions`.

    The mask stays on the device. One copy to the host, of the union box, the reason and the first 256 boxes and scores,
    waits for the device at the end; of more regions two further copies follow. Scratch takes 4 bytes a pixel and 52 for
    each region that an image of this size can have, in all 30 bytes a pixel (17 with 8-connectivity).
    """
    saliency = saliency.detach().contiguous()
    scratch, buffers = memory(saliency, options)
    launch(saliency, options, scratch, buffers)
    return read(buffers)


def memory(saliency: torch.Tensor, options: RegionOptions) -> tuple[torch.Tensor, RegionBuffers]:
    """The operator's scratch and its outputs."""
    height, width = saliency.shape
    scratch = saliency.new_empty(scratch_bytes(height, width, options.connectivity), dtype=torch.uint8)
    return scratch, allocate(saliency, options, outcome_rows=OUTCOME_ROWS)


def launch(saliency: torch.Tensor, options: RegionOptions, scratch: torch.Tensor, buffers: RegionBuffers) -> None:
    """Launch the kernels on a contiguous saliency. Nothing is allocated or waited for: a CUDA graph can capture it."""
    cuda.operators.regions_cuda.default(saliency, *numbers(options), MOST_BLOCKS, scratch, *buffers)


def scratch_bytes(height: int, width: int, connectivity: int) -> int:
    """The bytes of the operator's scratch."""
    regions = most_regions(height, width, connectivity)
    return _STATE_BYTES + _REGION_BYTES * regions + _PIXEL_BYTES * height * width
