"""The contrast of task and general maps in plain torch: ratio, weighted sum, normalise, one resize for each view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from carve_kernels.types import Size


def supports(*_args: Any, **_options: Any) -> str | None:
    """The reference serves everything."""
    return None


def forward(
    task: torch.Tensor,
    general: torch.Tensor,
    grid: Size | Sequence[Size],
    size: Size | Sequence[Size],
    *,
    lam: float | str,
    layer_weights: torch.Tensor | Sequence[float] | None = None,
    step_weights: torch.Tensor | Sequence[float] | None = None,
    normalize: str = "none",
) -> torch.Tensor | list[torch.Tensor]:
    """The saliency of one view, or a list of them for lists of grids and sizes; see `carve_kernels.contrast`."""
    layers, steps, _ = task.shape
    by_layer, by_step = (
        # Weights are float64, which not every device has.
        torch.as_tensor(values, dtype=task.dtype, device="cpu").to(task.device)
        for values in (
            [1.0] * layers if layer_weights is None else layer_weights,
            range(1, steps + 1) if step_weights is None else step_weights,
        )
    )

    divisor = general + (general.mean(-1, keepdim=True) if lam == "mean" else float(lam))
    # A divisor of 0 gives a ratio of 0, not NaN.
    ratio = torch.where(divisor > 0, task / divisor, 0)
    fused = _normalize((ratio * by_layer[:, None, None] * by_step[:, None]).sum((0, 1)), normalize)

    if isinstance(grid[0], int):
        return _upsample(fused, grid, size)  # type: ignore[arg-type]
    views = fused.split([rows * columns for rows, columns in grid])  # type: ignore[misc]
    return [_upsample(*view) for view in zip(views, grid, size, strict=True)]  # type: ignore[arg-type]


def _normalize(fused: torch.Tensor, kind: str) -> torch.Tensor:
    low = fused.min() if kind == "minmax" else fused.new_zeros(())
    total = {"none": fused.new_ones(()), "sum": fused.sum()}.get(kind, fused.max() - low)
    return torch.where(total > 0, (fused - low) / total, 0)


def _upsample(values: torch.Tensor, grid: Size, size: Size) -> torch.Tensor:
    image = values.reshape(1, 1, *grid)
    # Without antialias, bilinear skips tokens as soon as the image has fewer pixels than the grid has tokens.
    return functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)[0, 0]
