"""Contrast by the compiled operator: one read of the maps, in float64, for any number of layers and steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from carve_kernels.backends.native.limits import contrast_limit
from carve_kernels.types import NORMALIZE, Size


def supports(task: torch.Tensor, general: torch.Tensor, *_args: Any, **_options: Any) -> str | None:
    """Why these arguments cannot be served, or None."""
    return contrast_limit(task, general)


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
    several = not isinstance(grid[0], int)
    views = cast("list[tuple[Size, Size]]", list(zip(grid, size, strict=True)) if several else [(grid, size)])
    pixels = [height * width for _, (height, width) in views]
    out = task.new_empty(sum(pixels))
    torch.ops.carve_kernels.contrast_cpu.default(
        task.contiguous(),
        general.contiguous(),
        _weights([1.0] * layers if layer_weights is None else layer_weights),
        _weights(range(1, steps + 1) if step_weights is None else step_weights),
        [number for tokens, shape in views for number in (*tokens, *shape)],
        0.0 if lam == "mean" else float(lam),
        lam == "mean",
        # A number, since the stable ABI of torch 2.13 leaks every string argument.
        NORMALIZE.index(normalize),
        out,
    )
    if not several:
        return out.view(views[0][1])
    return [part.view(shape) for part, (_, shape) in zip(out.split(pixels), views, strict=True)]


def _weights(values: torch.Tensor | Sequence[float]) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").contiguous()
