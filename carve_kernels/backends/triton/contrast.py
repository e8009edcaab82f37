"""Contrast in two launches for any number of layers, steps and views: the token grid, then the pixels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import triton

from carve_kernels.backends.native.limits import contrast_limit
from carve_kernels.backends.triton import too_old
from carve_kernels.backends.triton.contrast_kernels import contrast_grid_kernel, contrast_pixels_kernel
from carve_kernels.backends.triton.contrast_plan import BLOCK_X, BLOCK_Y, is_too_long, plan_grid
from carve_kernels.backends.triton.workspace import Workspace
from carve_kernels.types import Size

_workspace = Workspace()


def supports(
    task: torch.Tensor,
    general: torch.Tensor,
    grid: Size | Sequence[Size],
    size: Size | Sequence[Size],
    **_options: Any,
) -> str | None:
    """Why these arguments cannot be served, or None."""
    if reason := contrast_limit(task, general):
        return reason
    for tokens, pixels in _views(grid, size):
        if is_too_long(tokens, pixels):
            return f"{tokens} tokens over {pixels} pixels pass 2^28 on an axis; use backend='reference'"
    return too_old(task.device.index) if task.device.type == "cuda" else None


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
    layers, steps, tokens = task.shape
    views = _views(grid, size)
    plan = plan_grid(layers * steps, tokens)
    weights = _weights(
        _tuple([1.0] * layers if layer_weights is None else layer_weights),
        _tuple(range(1, steps + 1) if step_weights is None else step_weights),
        task.device,
    )
    # The fused grid, the minimum, maximum and sum of each of its blocks, and the sum of each chunk of maps.
    floats = tokens + 3 * plan.blocks + plan.chunks * tokens
    scratch, tickets = _workspace.take(task.device, floats, plan.blocks)
    contrast_grid_kernel.launch(
        (plan.chunks, plan.blocks, 1),
        (task, general, weights, scratch, tickets),
        (
            *task.stride(),
            general.stride(0),
            general.stride(1) if general.shape[1] > 1 else 0,
            general.stride(2),
            layers * steps,
            steps,
            tokens,
            plan.maps,
            0.0 if lam == "mean" else float(lam),
        ),
        (lam == "mean", plan.block_token),
        device=task.device,
        warps=plan.warps,
        stages=1,
    )
    pixels = [height * width for _, (height, width) in views]
    saliency = task.new_empty(sum(pixels))
    sizes = _columns(views)
    contrast_pixels_kernel.launch(
        (max(-(-height // BLOCK_Y) * -(-width // BLOCK_X) for _, (height, width) in views), len(views), 1),
        (scratch, saliency),
        (*sizes, tokens, plan.blocks),
        (len(sizes[0]), normalize, BLOCK_Y, BLOCK_X),
        device=task.device,
        warps=4,
        stages=1,
    )
    if isinstance(grid[0], int):
        return saliency.view(views[0][1])
    return [part.view(shape) for part, (_, shape) in zip(saliency.split(pixels), views, strict=True)]


def _views(grid: Any, size: Any) -> list[tuple[Size, Size]]:
    several = not isinstance(grid[0], int)
    return cast("list[tuple[Size, Size]]", list(zip(grid, size, strict=True)) if several else [(grid, size)])


def _columns(views: list[tuple[Size, Size]]) -> list[tuple[int, ...]]:
    """Rows and columns of tokens, heights and widths of all views: as arguments, they need no copy to the device.

    Triton compiles a kernel for each number of views, so it is padded to a power of two. It also compiles one for a 1
    or a multiple of 16 in a tuple, so a number n is passed as 2 n + 1, which is neither.
    """
    padded = views + views[-1:] * (triton.next_power_of_2(len(views)) - len(views))
    return list(zip(*[[2 * number + 1 for number in (*grid, *size)] for grid, size in padded], strict=True))


def _tuple(values: torch.Tensor | Sequence[float]) -> tuple[float, ...]:
    return tuple(values.tolist() if isinstance(values, torch.Tensor) else values)


@functools.lru_cache(maxsize=1024)
def _weights(by_layer: tuple[float, ...], by_step: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The weight of each layer and step [L, T], cached: the host waits for each copy to the device."""
    layers, steps = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (by_layer, by_step))
    return (layers[:, None] * steps).to(torch.float32).to(device)
