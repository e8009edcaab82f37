"""The stages in order, from maps and an image: the pairing of steps and `carve`. Independent of models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from carve_kernels import checks
from carve_kernels.ops.contrast import contrast, is_several, weights
from carve_kernels.ops.regions import regions
from carve_kernels.ops.zoom import check_box, refuse_turned, to_rgb, zoom
from carve_kernels.presets import Preset, check_steps
from carve_kernels.types import Box, Regions, Size

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CarveOutcome", "Preset", "carve", "pair"]

# Two computations of one prompt's maps may differ by this share of their ratio, in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class CarveOutcome:
    """The result of `carve`.

    ========  =========  ======  ====================================================================
    name      dtype      shape   meaning
    ========  =========  ======  ====================================================================
    saliency  as task    [H, W]  contrast on the pixels of the whole image, 0 where there is no view
    regions   Regions            mask, boxes, scores and box in pixels of the whole image
    refined   PIL image          the selected regions magnified, or the image itself
    reason    str                why no region was selected, or None
    seconds   dict               time of each of the stages contrast, regions and zoom that ran
    ========  =========  ======  ====================================================================
    """

    saliency: torch.Tensor
    regions: Regions
    refined: Image
    reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def pair(
    task: torch.Tensor, general: torch.Tensor, steps: str, *, step_weights: Sequence[float] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pair the steps of two answers: task [L, T1, N] and general [L, T2, N] -> both [L, T, N], and weights [T].

    "t_start" pairs first with first, "t_end" last with last, "t_full" step t with t up to the shorter answer.
    The weights are 1, 2, 3, ..., or the first T of `step_weights`, which only "t_full" accepts; steps beyond them are
    not read.
    """
    check_steps(steps, step_weights)
    return _pair(task, general, steps, step_weights)


def _pair(
    task: torch.Tensor, general: torch.Tensor, steps: str, step_weights: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if steps == "t_start":
        task, general = task[:, :1], general[:, :1]
    elif steps == "t_end":
        task, general = task[:, -1:], general[:, -1:]
    count = min(task.shape[1], general.shape[1])
    if step_weights is not None:
        count = min(count, len(step_weights))
    given = None if step_weights is None else step_weights[:count]
    return task[:, :count], general[:, :count], weights("step_weights", given, range(1, count + 1)).to(task)


def carve(
    image: Image,
    task: torch.Tensor,
    general: torch.Tensor,
    *,
    grid: Size | Sequence[Size],
    preset: str | Preset | Mapping[str, Any] = "paper",
    box: Box | Sequence[Box] | None = None,
    backend: str = "auto",
) -> CarveOutcome:
    """CARVE from maps and an image: pair the steps, contrast, regions, zoom.

    Equals, on the part of the image that the grid covers::

        task, general, step_weights = pair(task, general, preset.steps, step_weights=preset.step_weights)
        saliency = contrast(task, general, grid, (y1 - y0, x1 - x0), lam=preset.lam, step_weights=step_weights)
        found = regions(saliency, keep=preset.keep, top=preset.top, floor=preset.floor)
        refined = zoom(image, found.mask, found.box, size=preset.size)

    ========  ==================  ==========  =====================================================================
    name      dtype               shape       meaning
    ========  ==================  ==========  =====================================================================
    image     PIL image           H x W       the original; any mode that `zoom` takes
    task      float32 or float64  [L, T1, N]  attention on each token, by layer and step of the answer
    general   as task             [L, T2, N]  the same for the general instruction
    grid      int                 (GH, GW)    rows and columns of tokens; or a list of grids, N = all of them
    preset    str, Preset, dict               "paper", "release", or other values
    box       float               4           x0 y0 x1 y1 of the image that the grid covers, pixels (rounded);
                                              None = the whole image; a list for a list of grids
    (result)  CarveOutcome                    saliency, regions, refined image, reason
    ========  ==================  ==========  =====================================================================

    Outside the box the saliency is 0, the mask is False, and `keep` is a share of the pixels inside. Of several views a
    later one overwrites an earlier one, so pass the base first and finer tiles after it; `keep` is then a share of the
    rectangle around all of them. A degenerate map (no steps, constant, all 0) gives no region: `refined` is the
    original, and `reason` says why.

    Raises what `contrast`, `regions` and `zoom` raise, and ValueError for a box outside the image and for an image with
    an EXIF orientation, since the maps may be of its stored or of its rotated pixels.

    Source: the pipeline of CARVE (arXiv 2509.06461); the presets name the values of the paper and of its release.
    """
    settings = Preset.of(preset)
    original = to_rgb("image", image)
    refuse_turned("image", image)
    several = is_several(grid)
    grids: Any = list(grid) if several else [grid]
    boxes: Any = [None] * len(grids) if box is None else list(box) if is_several(box) else [box]
    if len(boxes) != len(grids):
        raise ValueError(f"box: expected {len(grids)} boxes, one for each grid, got {checks.describe(box)}")
    whole = (0.0, 0.0, float(original.width), float(original.height))
    # Rounding may add half a pixel.
    checked = [whole if given is None else check_box(given, original.size, checks.number, 0.5) for given in boxes]
    for name, maps in (("task", task), ("general", general)):
        checks.tensor(name, maps, shape=("L", "T", "N"), dtypes=(torch.float32, torch.float64))
    return carve_views(original, task, general, grids, checked, settings, backend)


def carve_views(
    image: Image,
    task: torch.Tensor,
    general: torch.Tensor,
    grids: Sequence[Size],
    boxes: Sequence[Box],
    preset: Preset,
    backend: str,
) -> CarveOutcome:
    """`carve` with checked arguments and boxes that may reach into the padding of the image."""
    saliency = torch.zeros(image.height, image.width, dtype=task.dtype, device=task.device)
    if task.numel() == 0 or general.numel() == 0:
        return _unchanged(image, saliency, "the maps are empty", {})
    rectangles = [_rectangle(box, image.size) for box in boxes]
    task, general, by_step = _pair(task, general, preset.steps, preset.step_weights)
    sizes = [(bottom - top, right - left) for left, top, right, bottom in rectangles]
    start = time.perf_counter()
    views = contrast(
        task, general, list(grids), sizes, lam=preset.lam, layer_weights=preset.layer_weights, step_weights=by_step,
        normalize=preset.normalize, backend=backend,
    )  # fmt: skip
    if _is_flat(task, general, preset.lam):
        return _unchanged(image, saliency, "the saliency is constant", {"contrast": time.perf_counter() - start})
    covered = []
    for (left, top, right, bottom), view in zip(rectangles, views, strict=True):
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
        saliency[y0:y1, x0:x1] = view[y0 - top : y1 - top, x0 - left : x1 - left]
        covered.append((x0, y0, x1, y1))
    seconds = {"contrast": time.perf_counter() - start}
    lows, highs = torch.tensor(covered).amin(0).tolist(), torch.tensor(covered).amax(0).tolist()
    return _finish(image, saliency, (lows[0], lows[1], highs[2], highs[3]), preset, backend, seconds)


def _is_flat(task: torch.Tensor, general: torch.Tensor, lam: float | str) -> bool:
    """Whether the ratio of every layer and step is constant over the tokens, up to the rounding of the maps."""
    ratio = task / (general + (general.mean(-1, keepdim=True) if isinstance(lam, str) else lam))
    low, high = ratio.aminmax(dim=-1)
    return bool((high - low <= _ROUNDING * high).all())


def _finish(
    image: Image,
    saliency: torch.Tensor,
    covered: tuple[int, int, int, int],
    preset: Preset,
    backend: str,
    seconds: dict[str, float],
) -> CarveOutcome:
    """The regions of the covered part, in pixels of the whole image, and the refined image."""
    left, top, right, bottom = covered
    start = time.perf_counter()
    selected = regions(
        saliency[top:bottom, left:right], keep=preset.keep, top=preset.top, floor=preset.floor,
        connectivity=preset.connectivity, score=preset.score, backend=backend,
    )  # fmt: skip
    seconds["regions"] = time.perf_counter() - start
    if selected.reason is not None:
        return _unchanged(image, saliency, selected.reason, seconds)
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    mask[top:bottom, left:right] = selected.mask
    shift = (left, top, left, top)
    box = tuple(edge + offset for edge, offset in zip(selected.box, shift, strict=True))
    shifted = Regions(mask, selected.boxes + selected.boxes.new_tensor(shift), selected.scores, box)
    start = time.perf_counter()
    refined = zoom(image, mask, box, fill=preset.fill, resample=preset.resample, size=preset.size, limit=preset.limit)
    seconds["zoom"] = time.perf_counter() - start
    return CarveOutcome(saliency, shifted, refined, None, seconds)


def _unchanged(image: Image, saliency: torch.Tensor, reason: str, seconds: dict[str, float]) -> CarveOutcome:
    return CarveOutcome(saliency, Regions.whole(saliency, reason), image, reason, seconds)


def _rectangle(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in whole pixels, at least one of them inside an image of (width, height)."""
    (left, right), (top, bottom) = (_span(box[axis], box[axis + 2], size[axis]) for axis in (0, 1))
    return left, top, right, bottom


def _span(first: float, end: float, length: int) -> tuple[int, int]:
    low = min(round(first), length - 1) if first < -0.5 else min(max(0, round(first)), length - 1)
    high = round(end) if end > length + 0.5 else min(round(end), length)
    return low, max(max(low, 0) + 1, high)
