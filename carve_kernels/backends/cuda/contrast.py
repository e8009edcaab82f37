"""Contrast by CUDA kernels: two launches for any number of layers and steps, and up to 32 views."""

from __future__ import annotations

import torch

from carve_kernels.backends import cuda
from carve_kernels.backends.cuda.plan import MOST_MAPS, contrast_scratch
from carve_kernels.backends.native.limits import contrast_limit
from carve_kernels.backends.native.weights import on_device
from carve_kernels.types import NORMALIZE, ContrastOptions, Views

# As in csrc/cuda/contrast/contrast.cuh.
_MOST_CELLS_TIMES_PIXELS = 2**28 - 1
_MOST_CELLS_OF_A_QUAD = 10240


def supports(task: torch.Tensor, general: torch.Tensor, views: Views, _options: ContrastOptions) -> str | None:
    """Why these arguments cannot be served, or None."""
    if reason := contrast_limit(task, general):
        return reason
    if task.shape[0] * task.shape[1] > MOST_MAPS:
        return f"task has {task.shape[0]} x {task.shape[1]} maps, this backend serves {MOST_MAPS}; use backend='triton'"
    for grid, size in views:
        if any(cells * pixels > _MOST_CELLS_TIMES_PIXELS for cells, pixels in zip(grid, size, strict=True)):
            return f"{grid} tokens over {size} pixels pass 2^28 on an axis; use backend='reference'"
        if _cells_of_a_quad(grid[1], size[1]) > _MOST_CELLS_OF_A_QUAD:
            return (
                f"{grid[1]} tokens over {size[1]} pixels are more than {_MOST_CELLS_OF_A_QUAD} for four pixels of a "
                "row; use backend='reference'"
            )
    return cuda.foreign(task.device.index) if task.device.type == "cuda" else None


def forward(task: torch.Tensor, general: torch.Tensor, views: Views, options: ContrastOptions) -> torch.Tensor:
    """The pixels of the saliency of each view, in order and row-major; see `carve_kernels.contrast`."""
    lam, layer_weights, step_weights, normalize = options
    device, (layers, steps, tokens) = task.device, task.shape
    task, general = (maps if maps.stride(2) == 1 else maps.contiguous() for maps in (task, general))
    shapes = [number for grid, size in views for number in (*grid, *size)]
    by_layer, by_step = (on_device(tuple(weights.tolist()), device) for weights in (layer_weights, step_weights))
    scratch = task.new_empty(contrast_scratch(layers * steps, tokens), dtype=torch.uint8)
    out = task.new_empty(sum(height * width for _, (height, width) in views))
    # The normalisation is a number, since the stable ABI of torch 2.13 leaks every string argument.
    cuda.operators.contrast_cuda.default(
        task.detach(), general.detach(), by_layer, by_step, shapes,
        0.0 if lam == "mean" else float(lam), lam == "mean", NORMALIZE.index(normalize), scratch, out,
    )  # fmt: skip
    return out


def _cells_of_a_quad(cells: int, pixels: int) -> int:
    """The most tokens that four neighbouring pixels of an axis read, as the kernels bound it."""
    return min(cells, -(-3 * cells // pixels) + 1 + -(-2 * max(cells, pixels) // pixels))
