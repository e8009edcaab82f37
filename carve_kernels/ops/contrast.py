"""The public `contrast`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

from carve_kernels import checks
from carve_kernels.backends import resolve
from carve_kernels.types import NORMALIZE, ContrastOptions, Size, Views


@overload
def contrast(
    task: torch.Tensor,
    general: torch.Tensor,
    grid: Size,
    size: Size,
    *,
    lam: float | str = ...,
    layer_weights: Sequence[float] | torch.Tensor | None = ...,
    step_weights: Sequence[float] | torch.Tensor | None = ...,
    normalize: str = ...,
    check: bool | None = ...,
    backend: str = ...,
) -> torch.Tensor: ...


@overload
def contrast(
    task: torch.Tensor,
    general: torch.Tensor,
    grid: Sequence[Size],
    size: Sequence[Size],
    *,
    lam: float | str = ...,
    layer_weights: Sequence[float] | torch.Tensor | None = ...,
    step_weights: Sequence[float] | torch.Tensor | None = ...,
    normalize: str = ...,
    check: bool | None = ...,
    backend: str = ...,
) -> list[torch.Tensor]: ...


def contrast(
    task: torch.Tensor,
    general: torch.Tensor,
    grid: Size | Sequence[Size],
    size: Size | Sequence[Size],
    *,
    lam: float | str = "mean",
    layer_weights: Sequence[float] | torch.Tensor | None = None,
    step_weights: Sequence[float] | torch.Tensor | None = None,
    normalize: str = "none",
    check: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor | list[torch.Tensor]:
    """Contrast the maps of a question with those of a general instruction, on the pixels of the image.

    Equals, with a ratio of 0 where `general + lam` is 0::

        lam = general.mean(-1, keepdim=True) if lam == "mean" else lam
        fused = (task / (general + lam) * layer_weights[:, None, None] * step_weights[:, None]).sum((0, 1))
        fused = fused                                            # normalize="none"
        fused = fused / fused.sum()                              # "sum"
        fused = fused / fused.max()                              # "max"
        fused = (fused - fused.min()) / (fused.max() - fused.min())  # "minmax"
        saliency = interpolate(fused.reshape(1, 1, *grid), size, mode="bilinear", antialias=True)[0, 0]

    =============  ==================  ==============  ==========================================================
    name           dtype               shape           meaning
    =============  ==================  ==============  ==========================================================
    task           float32 or float64  [L, T, N]       attention on each token, by layer and step
    general        as task             [L, T or 1, N]  the same for the general instruction
    grid           int                 (GH, GW)        rows and columns of tokens, GH * GW = N
    size           int                 (H, W)          pixels of the result
    lam            float or "mean"                     added to general; "mean" = the mean of that general map
    layer_weights  float               [L]             None = 1 for every layer
    step_weights   float               [T]             None = 1, 2, 3, ...
    check          bool or None                        check for NaN and negatives; None = on the CPU only
    (result)       as task             [H, W]          the saliency
    =============  ==================  ==============  ==========================================================

    For several views of one map, pass a list of grids and a list of sizes; the N tokens are those of all views in
    order, the mean and the normalisation are over all of them, and the result is a list. A fused map that is 0 (or
    flat, for "minmax") normalises to 0. `task` and `general` must be paired step by step, as `carve` does.

    Raises TypeError or ValueError for an argument of the wrong kind, shape or range (a grid that does not hold N
    tokens, lam < 0, negative weights, NaN in the maps), and BackendUnavailable for a backend that cannot serve.

    Source: the contrast, the fusion and the upsampling of CARVE (arXiv 2509.06461); "mean" and `normalize` are ours.
    """
    checks.tensor("task", task, shape=("L", "T", "N"), dtypes=(torch.float32, torch.float64))
    layers, steps, tokens = task.shape
    if min(task.shape) < 1:
        raise ValueError(f"task: expected at least one layer, step and token, got {checks.describe(task)}")
    checks.tensor("general", general, shape=(layers, f"{steps} or 1" if steps > 1 else 1, tokens), dtypes=(task.dtype,))
    if general.shape[1] not in (1, steps):
        raise ValueError(f"general: expected {steps} steps or 1 to go with task, got {checks.describe(general)}")
    if general.device != task.device:
        raise ValueError(f"general: expected a tensor on {task.device} like task, got {checks.describe(general)}")
    options = contrast_options(lam, layer_weights, step_weights, normalize, layers=layers, steps=steps)
    views = views_of(grid, size, tokens)
    checks.flag("check", check)
    if check or (check is None and task.device.type == "cpu"):
        check_values("task", task)
        check_values("general", general)
    module = resolve("contrast", backend, task.device, task, general, views, options)
    pixels = module.forward(task, general, views, options).split([height * width for _, (height, width) in views])
    maps = [values.view(shape) for values, (_, shape) in zip(pixels, views, strict=True)]
    return maps if is_several(grid) else maps[0]


def contrast_options(
    lam: Any, layer_weights: Any, step_weights: Any, normalize: Any, *, layers: int, steps: int
) -> ContrastOptions:
    """Check the options of a contrast."""
    if not isinstance(lam, str) or lam != "mean":
        lam = checks.number("lam", lam, low=0)
    checks.choice("normalize", normalize, NORMALIZE)
    by_layer = weights("layer_weights", layer_weights, [1.0] * layers)
    by_step = weights("step_weights", step_weights, range(1, steps + 1))
    return ContrastOptions(lam, by_layer, by_step, normalize)


def weights(name: str, value: Any, default: Sequence[float]) -> torch.Tensor:
    """Check len(default) weights; float64 on the CPU."""
    if value is None:
        return torch.tensor(default, dtype=torch.float64, device="cpu")
    values = value.tolist() if isinstance(value, torch.Tensor) else value
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: expected a sequence of numbers, got {checks.describe(value)}")
    if len(values) != len(default):
        raise ValueError(f"{name}: expected {len(default)} weights, got {len(values)}: {checks.describe(value)}")
    listed = [checks.number(f"{name}[{index}]", weight, low=0) for index, weight in enumerate(values)]
    return torch.tensor(listed, dtype=torch.float64, device="cpu")


def views_of(grid: Any, size: Any, tokens: int) -> Views:
    """Check one grid and size, or as many of each."""
    if not is_several(grid):
        views = [(checks.size("grid", grid), checks.size("size", size))]
    else:
        grids = [checks.size(f"grid[{index}]", view) for index, view in enumerate(grid)]
        if not is_several(size) or len(size) != len(grid):
            raise ValueError(f"size: expected {len(grid)} sizes, one for each grid, got {checks.describe(size)}")
        views = list(zip(grids, [checks.size(f"size[{index}]", view) for index, view in enumerate(size)], strict=True))
    total = sum(rows * columns for (rows, columns), _ in views)
    if total != tokens:
        listed = " + ".join(f"{rows} x {columns}" for (rows, columns), _ in views)
        raise ValueError(f"grid: expected {tokens} tokens, got {listed} = {total} tokens")
    return views


def is_several(value: Any) -> bool:
    """Whether a value is a sequence of sequences, for several views, and not of numbers, for one view."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(view, (list, tuple)) for view in value)


def check_values(name: str, value: torch.Tensor) -> None:
    """Refuse maps that are not finite or below 0."""
    least, most = value.aminmax()
    low, high = least.item(), most.item()
    if not 0 <= low <= high < float("inf"):
        got = "NaN" if low != low else f"values from {low:g} to {high:g}"
        raise ValueError(f"{name}: expected finite values of at least 0, got {got}")
