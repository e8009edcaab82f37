"""Contrast in two launches for any number of layers, steps and views: the token grid, then the pixels."""

from __future__ import annotations

import functools

import torch
import triton

from carve_kernels.backends.native.limits import contrast_limit
from carve_kernels.backends.native.scratch import Memory, ScratchNeeds
from carve_kernels.backends.triton import too_old
from carve_kernels.backends.triton.contrast_kernels import contrast_grid_kernel, contrast_pixels_kernel
from carve_kernels.backends.triton.contrast_plan import BLOCK_X, BLOCK_Y, is_too_long, plan_grid
from carve_kernels.types import ContrastOptions, Views


def supports(task: torch.Tensor, general: torch.Tensor, views: Views, _options: ContrastOptions) -> str | None:
    """Why these arguments cannot be served, or None."""
    if reason := contrast_limit(task, general):
        return reason
    for grid, size in views:
        if is_too_long(grid, size):
            return f"{grid} tokens over {size} pixels pass 2^28 on an axis; use backend='reference'"
    return too_old(task.device.index) if task.device.type == "cuda" else None


def forward(task: torch.Tensor, general: torch.Tensor, views: Views, options: ContrastOptions) -> torch.Tensor:
    """The pixels of the saliency of each view, in order and row-major; see `carve_kernels.contrast`."""
    lam, layer_weights, step_weights, normalize = options
    device, (layers, steps, tokens) = task.device, task.shape
    plan = plan_grid(layers * steps, tokens)
    weights = _weights(tuple(layer_weights.tolist()), tuple(step_weights.tolist()), device)
    # The fused grid, the minimum, maximum and sum of each of its blocks, and the sum of each chunk of maps.
    floats = tokens + 3 * plan.blocks + plan.chunks * tokens
    memory = Memory.new(ScratchNeeds(floats * torch.float32.itemsize, plan.blocks), device)
    scratch, tickets = memory.scratch.view(torch.float32), memory.tickets
    by_layer, by_step, by_token = general.stride()
    contrast_grid_kernel.launch(
        (plan.chunks, plan.blocks, 1),
        (task, general, weights, scratch, tickets),
        (
            *task.stride(), by_layer, by_step if general.shape[1] > 1 else 0, by_token,
            layers * steps, steps, tokens, plan.maps, 0.0 if lam == "mean" else float(lam),
        ),
        (lam == "mean", plan.block_token),
        device=device, warps=plan.warps, stages=1,
    )  # fmt: skip
    saliency = task.new_empty(sum(height * width for _, (height, width) in views))
    sizes = _columns(views)
    blocks = max(-(-height // BLOCK_Y) * -(-width // BLOCK_X) for _, (height, width) in views)
    contrast_pixels_kernel.launch(
        (blocks, len(views), 1),
        (scratch, saliency),
        (*sizes, tokens, plan.blocks),
        (len(sizes[0]), normalize, BLOCK_Y, BLOCK_X),
        device=device, warps=4, stages=1,
    )  # fmt: skip
    return saliency


def _columns(views: Views) -> list[tuple[int, ...]]:
    """Rows and columns of tokens, heights and widths of all views: as arguments, they need no copy to the device.

    Triton compiles a kernel for each number of views, so it is padded to a power of two. It also compiles one for a 1
    or a multiple of 16 in a tuple, so a number n is passed as 2 n + 1, which is neither.
    """
    padded = [*views, *[views[-1]] * (triton.next_power_of_2(len(views)) - len(views))]
    return list(zip(*[[2 * number + 1 for number in (*grid, *size)] for grid, size in padded], strict=True))


@functools.lru_cache(maxsize=1024)
def _weights(by_layer: tuple[float, ...], by_step: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The weight of each layer and step [L, T], cached: the host waits for each copy to the device."""
    layers, steps = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (by_layer, by_step))
    return (layers[:, None] * steps).to(torch.float32).to(device)
