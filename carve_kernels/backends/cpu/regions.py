"""Regions by the compiled operator: selection instead of a sort, runs instead of labels."""

from __future__ import annotations

import torch

from carve_kernels.backends.native.region_buffers import allocate, numbers, read, too_large
from carve_kernels.types import RegionOptions, Regions


def supports(saliency: torch.Tensor, _options: RegionOptions) -> str | None:
    """Why these arguments cannot be served, or None."""
    return too_large(saliency)


def forward(saliency: torch.Tensor, options: RegionOptions) -> Regions:
    """The selected regions, or the whole image and the reason; see `carve_kernels.regions`."""
    # Memory of the worst case costs nothing until it is written; the result is copied out of it.
    buffers = allocate(saliency, options)
    torch.ops.carve_kernels.regions_cpu(saliency.detach().contiguous(), *numbers(options), *buffers)
    return read(buffers)
