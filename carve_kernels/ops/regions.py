"""The public `regions`."""

from __future__ import annotations

import torch

from carve_kernels import checks
from carve_kernels.backends import resolve
from carve_kernels.types import SCORES, RegionOptions, Regions

# Of an image [H, W], and of frames [F, H, W]: sharing a side, or also corners.
CONNECTIVITY = {2: (4, 8), 3: (6, 26)}
_SHAPES = {2: ("H", "W"), 3: ("F", "H", "W")}
# More regions than any saliency has.
_ALL = 2**63 - 1


def regions(
    saliency: torch.Tensor,
    *,
    keep: float,
    top: int | None = None,
    floor: int | None = None,
    min_size: int | None = None,
    connectivity: int | None = None,
    score: str = "sum",
    check: bool | None = None,
    backend: str = "auto",
) -> Regions:
    """Threshold a saliency and select the best connected regions.

    Equals::

        threshold = numpy.percentile(saliency, 100 * (1 - keep))        # linear, in the saliency's own dtype
        labels, count = scipy.ndimage.label(saliency >= threshold)      # 4- or 8-connected; over frames 6- or 26-
        large = numpy.flatnonzero(numpy.bincount(labels.ravel())[1:] >= (min_size or 1)) + 1
        scores = scipy.ndimage.sum(saliency, labels, large)
        selected = large[scores.argsort()[::-1]][: top or max(floor, int(len(large) * keep))]    # all without both
        mask = numpy.isin(labels, selected)

    ============  ==================  ======  ===================================================================
    name          dtype               shape   meaning
    ============  ==================  ======  ===================================================================
    saliency      float32 or float64  [H, W]  from `contrast`, or any other; or frames of a video, [F, H, W]
    keep          float                       share of the pixels above the threshold, in (0, 1]
    top           int or None                 select at most `top` regions (the paper), or:
    floor         int or None                 select max(floor, int(count * keep)) (the release)
    min_size      int or None                 leave out regions of fewer pixels; without top and floor select the rest
    connectivity  int or None                 4 (None), or 8 to join over corners; over frames 6 (None) or 26
    score         str                         "sum", "mean" or "max" of the saliency inside a region
    check         bool or None                check for NaN; None = on the CPU only
    (result)      Regions                     mask, boxes, scores, their union box; the reason where there is none
    ============  ==================  ======  ===================================================================

    Sums are of integers, rint(saliency / max(abs(saliency)) * 2^36) (fewer bits beyond 2^26 pixels, so that no sum can
    overflow), so every backend ranks regions in the same order; equal scores are in the order of their first pixel.
    Negative values are allowed. Regions that min_size leaves out count for neither top nor floor. As in the release, a
    pixel that equals the threshold is selected: where the lowest value fills more than 1 - keep of the pixels, the
    threshold is that value and everything is one region.

    The regions of a saliency [F, H, W] go on from a frame to the next one, where a pixel touches the one in its place
    (6) or also the eight around that (26). The threshold is that of all frames, a region's size is its pixels in all of
    them, and boxes have six edges, x0 y0 f0 x1 y1 f1.

    On a GPU the mask stays there, and boxes and scores come to the CPU with the box: one copy, which waits for the
    device once (two more copies where more than 256 regions are selected).

    A saliency that is empty, infinite somewhere, flat (to 16 roundings of its dtype, which upsampling may add) or
    without a region of `min_size` pixels has none: the mask is all True, the box is all of it, and `reason` says why.

    Raises TypeError or ValueError for an argument of the wrong kind, shape or range (top and floor, or neither and no
    min_size; NaN in the saliency), and BackendUnavailable for a backend that cannot serve.

    Source: the threshold and the region selection of CARVE (arXiv 2509.06461), where top is K; floor and min_size are
    the release's.
    """
    dims = 3 if isinstance(saliency, torch.Tensor) and saliency.dim() == 3 else 2
    checks.tensor("saliency", saliency, shape=_SHAPES[dims], dtypes=(torch.float32, torch.float64))
    options = region_options(
        keep=keep, top=top, floor=floor, min_size=min_size, connectivity=connectivity, score=score, dims=dims
    )
    checks.flag("check", check)
    result: Regions = resolve("regions", backend, saliency.device, saliency, options).forward(saliency, options)
    # For a value that is not finite every backend gives no region, so NaN is searched for only then.
    is_checked = check or (check is None and saliency.device.type == "cpu")
    if is_checked and result.reason is not None and bool(saliency.isnan().any()):
        raise ValueError(f"saliency: expected no NaN, got {int(saliency.isnan().sum())} in {checks.describe(saliency)}")
    return result


def region_options(
    *,
    keep: float,
    top: int | None = None,
    floor: int | None = None,
    min_size: int | None = None,
    connectivity: int | None = None,
    score: str = "sum",
    dims: int = 2,
) -> RegionOptions:
    """Check the options of `regions` for a saliency of 2 or 3 dimensions."""
    keep = share("keep", keep)
    if min_size is not None:
        min_size = checks.limit("min_size", min_size)
        top = _ALL if top is None and floor is None else top
    top, floor = limits(top, floor, ", or min_size without both")
    sides, corners = CONNECTIVITY[dims]
    if connectivity is None:
        connectivity = sides
    elif type(connectivity) is not int or connectivity not in (sides, corners):
        shape = "frames [F, H, W], where 4 and 8 are those of an image" if dims == 3 else "an image [H, W]"
        raise ValueError(
            f"connectivity: expected one of {sides}, {corners} for {shape}, got {checks.describe(connectivity)}"
        )
    checks.choice("score", score, SCORES)
    return RegionOptions(keep, top, floor, connectivity, score, 1 if min_size is None else min_size)


def share(name: str, value: float) -> float:
    """Check a share in (0, 1]."""
    if checks.number(name, value, low=0, high=1) == 0:
        raise ValueError(f"{name}: expected a share above 0 and at most 1, got {checks.describe(value)}")
    return float(value)


def limits(top: int | None, floor: int | None, instead: str = "") -> tuple[int | None, int | None]:
    """Check that exactly one of top and floor is given; `instead` says what else there may be."""
    if (top is None) == (floor is None):
        raise ValueError(
            f"top, floor: expected exactly one of them and None for the other{instead}, got top={top!r} and "
            f"floor={floor!r}"
        )
    if top is not None:
        return checks.limit("top", top), None
    return None, checks.limit("floor", floor)
