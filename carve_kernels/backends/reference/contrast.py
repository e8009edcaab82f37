"""The contrast of task and general maps in plain torch: ratio, weighted sum, normalise, one resize for each view."""

from __future__ import annotations

import torch
from torch.nn import functional

from carve_kernels.types import ContrastOptions, Size, Views


def supports(*_: object) -> str | None:
    """The reference serves everything."""
    return None


def forward(task: torch.Tensor, general: torch.Tensor, views: Views, options: ContrastOptions) -> torch.Tensor:
    """The pixels of the saliency of each view, in order and row-major; see `carve_kernels.contrast`."""
    lam, layer_weights, step_weights, normalize = options
    # Weights are float64, which not every device has.
    by_layer, by_step = (values.to(task.dtype).to(task.device) for values in (layer_weights, step_weights))
    divisor = general + (general.mean(-1, keepdim=True) if lam == "mean" else float(lam))
    # A divisor of 0 gives a ratio of 0, not NaN.
    ratio = torch.where(divisor > 0, task / divisor, 0)
    fused = _normalize((ratio * by_layer[:, None, None] * by_step[:, None]).sum((0, 1)), normalize)
    maps = fused.split([rows * columns for (rows, columns), _ in views])
    return torch.cat([_upsample(values, *view).flatten() for values, view in zip(maps, views, strict=True)])


def _normalize(fused: torch.Tensor, kind: str) -> torch.Tensor:
    low = fused.min() if kind == "minmax" else fused.new_zeros(())
    total = {"none": fused.new_ones(()), "sum": fused.sum()}.get(kind, fused.max() - low)
    return torch.where(total > 0, (fused - low) / total, 0)


def _upsample(values: torch.Tensor, grid: Size, size: Size) -> torch.Tensor:
    image = values.reshape(1, 1, *grid)
    # Without antialias, bilinear skips tokens as soon as the image has fewer pixels than the grid has tokens.
    return functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)[0, 0]
