"""Contrast by the compiled operator: one read of the maps, in float64, for any number of layers and steps."""

from __future__ import annotations

import torch

from carve_kernels.backends.native.limits import contrast_limit
from carve_kernels.types import NORMALIZE, ContrastOptions, Views


def supports(task: torch.Tensor, general: torch.Tensor, *_: object) -> str | None:
    """Why these arguments cannot be served, or None."""
    return contrast_limit(task, general)


def forward(task: torch.Tensor, general: torch.Tensor, views: Views, options: ContrastOptions) -> torch.Tensor:
    """The pixels of the saliency of each view, in order and row-major; see `carve_kernels.contrast`."""
    lam, layer_weights, step_weights, normalize = options
    shapes = [number for grid, size in views for number in (*grid, *size)]
    out = task.new_empty(sum(height * width for _, (height, width) in views))
    # The normalisation is a number, since the stable ABI of torch 2.13 leaks every string argument.
    torch.ops.carve_kernels.contrast_cpu.default(
        task.contiguous(), general.contiguous(), layer_weights, step_weights, shapes,
        0.0 if lam == "mean" else float(lam), lam == "mean", NORMALIZE.index(normalize), out,
    )  # fmt: skip
    return out
