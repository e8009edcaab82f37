"""Regions on the device: radix selection, union-find in tiles and then between them, integer sums, merge sort."""

from __future__ import annotations

import math
from collections.abc import Sequence

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

# Counters of the digits of all passes and some numbers; 52 bytes for each possible region of a frame, 8 more for the
# edges that only the box of a video has, 4 for each pixel.
_STATE_BYTES = (2**13 + 2**11 + 4 * 2**10) * 4 + 112
_REGION_BYTES, _FRAMES_BYTES = 52, 8
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
    each region that an image of this size can have, in all 30 bytes a pixel (17 with 8-connectivity); over frames 60
    for each region of each frame.
    """
    saliency = saliency.detach().contiguous()
    scratch, buffers = memory(saliency, options)
    launch(saliency, options, scratch, buffers)
    return read(buffers)


def memory(saliency: torch.Tensor, options: RegionOptions) -> tuple[torch.Tensor, RegionBuffers]:
    """The operator's scratch and its outputs."""
    scratch = saliency.new_empty(scratch_bytes(saliency.shape, options.connectivity), dtype=torch.uint8)
    return scratch, allocate(saliency, options, outcome_rows=OUTCOME_ROWS)


def launch(saliency: torch.Tensor, options: RegionOptions, scratch: torch.Tensor, buffers: RegionBuffers) -> None:
    """Launch the kernels on a contiguous saliency. Nothing is allocated or waited for: a CUDA graph can capture it."""
    cuda.operators.regions_cuda.default(saliency, *numbers(options), MOST_BLOCKS, scratch, *buffers)


def scratch_bytes(shape: Sequence[int], connectivity: int) -> int:
    """The bytes of the operator's scratch for a saliency of a shape."""
    # Each frame is labelled by itself, so that its regions are counted before they are joined to those of others.
    *frames, height, width = shape
    regions = math.prod(frames) * most_regions((height, width), connectivity)
    each = _REGION_BYTES + (_FRAMES_BYTES if frames else 0)
    return _STATE_BYTES + each * regions + _PIXEL_BYTES * math.prod(shape)
