"""The release's two figures of a result, drawn by matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from carve_kernels import checks
from carve_kernels.frontends.release.attention import Array, dynamic_reshape_attention
from carve_kernels.frontends.release.masking import save_path_of

if TYPE_CHECKING:
    from carve_kernels.frontends.release.pipeline import CarveOutput


def plot_pipeline(image: Image.Image, out: CarveOutput, save_path: str | None = None) -> Any:
    """The image, its saliency, the mask and the refined image side by side: a figure, written to `save_path` if any."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: expected a PIL image, got {checks.describe(image)}")
    _check(out, save_path)
    figure, axes = _subplots(1, 4, (16, 4))
    panels = ("Original", "Contrastive attention", "Top-K mask", "Refined image")
    for axis, title, content in zip(axes, panels, (image, image, out.mask_map, out.refined_image), strict=True):
        axis.imshow(content, cmap="gray")
        axis.set_title(title)
        axis.axis("off")
    edges = (0, image.width, image.height, 0)
    axes[1].imshow(_heat(out.sum_att_map, image.size), cmap="jet", alpha=0.5, extent=edges)
    return _finished(figure, save_path)


def plot_layerwise(out: CarveOutput, lam: float = 1e-8, step: int = 0, save_path: str | None = None) -> Any:
    """The ratio of both maps of each layer at one step on the grid of tokens: a figure, written to `save_path`."""
    _check(out, save_path)
    checks.number("lam", lam, low=0)
    count = min(len(out.query_attention), len(out.general_attention))
    checks.integer("step", step, low=-count, high=count - 1)
    pairs = zip(out.query_attention[step], out.general_attention[step], strict=True)
    ratios = [dynamic_reshape_attention(task / (general + lam), out.output_shape)[0] for task, general in pairs]
    grids = {layer: grid for layer, grid in enumerate(ratios) if grid is not None}
    across = max(1, math.ceil(math.sqrt(len(grids))))
    down = max(1, math.ceil(len(grids) / across))
    figure, axes = _subplots(down, across, (2.2 * across, 2.2 * down))
    for axis in axes:
        axis.axis("off")
    for axis, (layer, grid) in zip(axes, grids.items(), strict=False):
        axis.imshow(grid, cmap="viridis", interpolation="nearest")
        axis.set_title(f"Layer {layer}", fontsize=8)
    return _finished(figure, save_path)


def _check(out: CarveOutput, save_path: str | None) -> None:
    if not hasattr(out, "query_attention"):
        raise TypeError(f"out: expected what `carve` returned, got {checks.describe(out)}")
    save_path_of("save_path", save_path)


def _subplots(down: int, across: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
    return figure, list(axes.flat)


def _finished(figure: Any, save_path: str | None) -> Any:
    figure.tight_layout()
    if save_path:
        figure.savefig(save_path, dpi=150, bbox_inches="tight")
    return figure


def _heat(saliency: Array, size: tuple[int, int]) -> Array:
    shifted = saliency - saliency.min()
    scaled = shifted / (shifted.max() + 1e-8) * 255
    return np.asarray(Image.fromarray(scaled.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR))
