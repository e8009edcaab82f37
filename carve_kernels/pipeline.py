"""The stages in order, from maps and an image: the pairing of steps and `carve`. Independent of models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from carve_kernels import checks
from carve_kernels.ops.contrast import contrast, is_several, weights
from carve_kernels.ops.zoom import check_box, refuse_turned, to_rgb, zoom
from carve_kernels.presets import Preset, check_steps
from carve_kernels.types import Box, Regions, Size, View, brief
from carve_kernels.view_pixels import combine, density, rectangle, seen_pixels, select

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
    seen      bool       [H, W]  pixels of the image that some view covers
    ========  =========  ======  ====================================================================
    """

    saliency: torch.Tensor
    regions: Regions
    refined: Image
    reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    seen: torch.Tensor = field(kw_only=True)

    def __repr__(self) -> str:
        return brief(self, refined=self.refined, box=self.regions.box, saliency=self.saliency, reason=self.reason)


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
    grid: Size | View | Sequence[Size] | Sequence[View],
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
    grid      int                 (GH, GW)    rows and columns of tokens; or a list of grids, N = all of them; or the
                                              views of one image of a layout, whose boxes may reach into padding
    preset    str, Preset, dict               "paper", "release", or other values
    box       float               4           x0 y0 x1 y1 of the image that the grid covers, pixels (rounded);
                                              None = the whole image; a list for a list of grids
    (result)  CarveOutcome                    saliency, regions, refined image, reason
    ========  ==================  ==========  =====================================================================

    Pixels that no box covers are not `seen`: the saliency is 0 there and the mask False, and `keep` is a share of the
    others. Where boxes overlap, as those of tiles and of a thumbnail do, the saliency is the mean of the views,
    weighted by their tokens per area (`GH * GW / area of the box`), so that a fine tile counts for more than a coarse
    thumbnail; or the highest of them (`Preset.overlap="max"`). A degenerate map (no steps, constant, all 0) gives no
    region: `refined` is the original, and `reason` says why.

    Raises what `contrast`, `regions` and `zoom` raise, and ValueError for a `box` outside the image, for views of
    several images, and for an image with an EXIF orientation, since the maps may be of its stored or rotated pixels.

    Source: the pipeline of CARVE (arXiv 2509.06461); the presets name the values of the paper and of its release.
    """
    settings = Preset.of(preset)
    original = to_rgb("image", image)
    refuse_turned("image", image)
    grids, boxes = _grids_and_boxes(grid, box, original.size)
    for name, maps in (("task", task), ("general", general)):
        checks.tensor(name, maps, shape=("L", "T", "N"), dtypes=(torch.float32, torch.float64))
    if task.numel() and general.numel():
        # Before the steps are paired: an error has the shape that was passed.
        checks.tensor("general", general, shape=(task.shape[0], "T", task.shape[2]), dtypes=(task.dtype,))
    return carve_views(original, task, general, grids, boxes, settings, backend)


def _grids_and_boxes(grid: Any, box: Any, size: tuple[int, int]) -> tuple[list[Size], list[Box]]:
    """The grids and boxes of the arguments of `carve`, for an image of (width, height)."""
    given = list(grid) if isinstance(grid, (list, tuple)) else [grid]
    views = [each for each in given if isinstance(each, View)]
    if views:
        if len(views) < len(given):
            raise TypeError(f"grid: expected sizes or views, got both, {len(views)} views of {len(given)}")
        if box is not None:
            raise ValueError(f"box: expected None with views, which have their boxes, got {checks.describe(box)}")
        if len({(view.image, view.frame) for view in views}) > 1:
            raise ValueError("grid: expected views of one image or frame, got views of several; select them before")
        return [view.grid for view in views], [view.box for view in views]
    grids = (
        [checks.size(f"grid[{index}]", each) for index, each in enumerate(grid)]
        if is_several(grid)
        else [checks.size("grid", grid)]
    )
    boxes: Any = [None] * len(grids) if box is None else list(box) if is_several(box) else [box]
    if len(boxes) != len(grids):
        raise ValueError(f"box: expected {len(grids)} boxes, one for each grid, got {checks.describe(box)}")
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    # Rounding may add half a pixel.
    return grids, [whole if given is None else check_box(given, size, checks.number, 0.5) for given in boxes]


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
    start = time.perf_counter()
    saliency, seen, reason = _saliency((image.height, image.width), task, general, grids, boxes, preset, backend)
    seconds = {"contrast": time.perf_counter() - start}
    if reason is not None:
        return _unchanged(image, saliency, seen, reason, seconds)
    start = time.perf_counter()
    selected = select(saliency, seen, preset, backend)
    seconds["regions"] = time.perf_counter() - start
    if selected.reason is not None:
        return _unchanged(image, saliency, seen, selected.reason, seconds)
    start = time.perf_counter()
    refined = zoom(
        image, selected.mask, selected.box, fill=preset.fill, resample=preset.resample, size=preset.size,
        limit=preset.limit,
    )  # fmt: skip
    seconds["zoom"] = time.perf_counter() - start
    return CarveOutcome(saliency, selected, refined, None, seconds, seen=seen)


def strength(
    size: Size,
    task: torch.Tensor,
    general: torch.Tensor,
    grids: Sequence[Size],
    boxes: Sequence[Box],
    preset: Preset,
    backend: str,
) -> float:
    """How strong the contrast of an image is, to compare the images of one prompt: 0 where it is flat.

    It is the standard deviation (the RMS contrast) of the saliency over the seen pixels, before `Preset.normalize`,
    which would make the images alike. A mean over the area does not grow with an image's tokens or pixels.
    """
    plain = replace(preset, normalize="none")
    saliency, seen, reason = _saliency(size, task, general, grids, boxes, plain, backend)
    return 0.0 if reason is not None else float(saliency[seen].double().std(correction=0))


def _saliency(
    size: Size,
    task: torch.Tensor,
    general: torch.Tensor,
    grids: Sequence[Size],
    boxes: Sequence[Box],
    preset: Preset,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    """The saliency of an image of (height, width), its seen pixels, and why there is no contrast, or None."""
    rectangles = [rectangle(box, size) for box in boxes]
    seen = seen_pixels(rectangles, size, task.device)
    nothing = torch.zeros(size, dtype=task.dtype, device=task.device)
    if task.numel() == 0 or general.numel() == 0:
        return nothing, seen, "the maps are empty"
    if not bool(seen.any()):
        return nothing, seen, "the model was shown no part of it"
    task, general, by_step = _pair(task, general, preset.steps, preset.step_weights)
    # A view beside the image has tokens in the mean of the general map, and no pixels.
    sizes = [(1, 1) if each is None else (each[3] - each[1], each[2] - each[0]) for each in rectangles]
    views = contrast(
        task, general, list(grids), sizes, lam=preset.lam, layer_weights=preset.layer_weights, step_weights=by_step,
        normalize=preset.normalize, backend=backend,
    )  # fmt: skip
    if is_flat(task, general, preset.lam):
        return nothing, seen, "the saliency is constant"
    return combine(views, rectangles, list(map(density, grids, boxes)), size, preset.overlap), seen, None


def is_flat(task: torch.Tensor, general: torch.Tensor, lam: float | str) -> bool:
    """Whether the ratio of every layer and step is constant over the tokens, up to the rounding of the maps."""
    ratio = task / (general + (general.mean(-1, keepdim=True) if isinstance(lam, str) else lam))
    low, high = ratio.aminmax(dim=-1)
    return bool((high - low <= _ROUNDING * high).all())


def _unchanged(
    image: Image, saliency: torch.Tensor, seen: torch.Tensor, reason: str, seconds: dict[str, float]
) -> CarveOutcome:
    return CarveOutcome(saliency, Regions.whole(saliency, reason), image, reason, seconds, seen=seen)
