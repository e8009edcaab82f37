"""The release's three mask rules, the black mask, the crop and its magnification."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from carve_kernels import checks
from carve_kernels.arrays import as_array
from carve_kernels.ops.regions import regions
from carve_kernels.types import TOO_SMALL

Array = NDArray[Any]

STRATEGIES = ("remove_small", "size", "attention_sum")


def create_attention_mask(
    sum_att_map: Array,
    *,
    top_percent: float = 0.2,
    min_keep_regions: int = 3,
    outlier_percent: float = 0.1,
    strategy: str = "attention_sum",
) -> Array:
    """The pixels of the selected regions of a saliency [H, W], uint8 of 0 and 1.

    The pixels from the (1 - top_percent) quantile on make 4-connected regions, of which `strategy` selects:

    =============  =================================================================================================
    attention_sum  the max(min_keep_regions, int(count * top_percent)) of the largest sum of the saliency
    size           as many of the most pixels
    remove_small   all of at least int(selected pixels * outlier_percent / 100) pixels
    =============  =================================================================================================

    Raises TypeError or ValueError for an argument of the wrong kind or range, and for a saliency that is not finite.
    """
    floor = check_rule(top_percent, min_keep_regions, outlier_percent, strategy)
    # A copy: torch takes no negative strides, which `ascontiguousarray` leaves on axes of length 1.
    values = np.array(as_array("sum_att_map", sum_att_map), order="C")
    if values.ndim != 2 or values.dtype not in (np.float32, np.float64) or not np.isfinite(values).all():
        raise ValueError(
            f"sum_att_map: expected finite float32 or float64 values [H, W], got {checks.describe(sum_att_map)}"
        )
    saliency = torch.from_numpy(values)
    if strategy == "attention_sum":
        return _mask(regions(saliency, keep=top_percent, floor=floor).mask)
    if strategy == "size":
        # Values of 1 inside the mask and 0 outside have its regions, and their sums are sizes.
        every = regions(saliency, keep=top_percent, min_size=1).mask.double()
        return _mask(regions(every, keep=top_percent, floor=floor).mask)
    count = int(np.count_nonzero(values >= np.percentile(values, 100 * (1 - top_percent))))
    smallest = int(count * outlier_percent / 100)
    found = regions(saliency, keep=top_percent, min_size=max(smallest, 1))
    # A flat saliency is one region of all pixels.
    if found.reason == TOO_SMALL or smallest > count:
        return np.zeros(values.shape, dtype=np.uint8)
    return _mask(found.mask)


def check_rule(top_percent: float, min_keep_regions: int, outlier_percent: float, strategy: str) -> int:
    """Check the options of `create_attention_mask`; the least number of regions."""
    checks.choice("strategy", strategy, STRATEGIES)
    if checks.number("top_percent", top_percent, low=0, high=1) == 0:
        raise ValueError(f"top_percent: expected a share above 0 and at most 1, got {top_percent!r}")
    checks.number("outlier_percent", outlier_percent, low=0)
    return checks.integer("min_keep_regions", min_keep_regions, low=1)


def save_path_of(name: str, value: Any) -> Path | None:
    """Check where files are written; as in the release, None and an empty text write none."""
    if value is None or (isinstance(value, str) and not value):
        return None
    return checks.path(name, value)


def apply_mask_to_image(image: Image.Image, mask_map: Array) -> Image.Image:
    """An RGB image, black outside of a mask [H, W] of 0 and 1."""
    _check_image("image", image)
    mask = _checked_mask(mask_map)
    pixels = np.array(image)
    if pixels.shape != (*mask.shape, 3):
        raise ValueError(
            f"image, mask_map: expected an RGB image of {mask.shape[1]} x {mask.shape[0]} pixels, as mask_map, got "
            f"{checks.describe(image)}"
        )
    return Image.fromarray((pixels * mask[..., None]).astype(np.uint8))


def get_crop_bbox_from_mask(mask_map: Array) -> tuple[int, int, int, int]:
    """The box x0 y0 x1 y1 around the 1s of a mask, x1 and y1 exclusive; the whole image if there are none."""
    mask = _checked_mask(mask_map)
    rows, columns = (np.flatnonzero((mask == 1).any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def resize_crop_to_match_original(crop_image: Image.Image, original_size: tuple[int, int]) -> Image.Image:
    """A crop magnified by LANCZOS until both sides reach those of (width, height), its aspect kept."""
    _check_image("crop_image", crop_image)
    sides = checks.numbers("original_size", original_size, ("width", "height"), partial(checks.integer, low=1))
    (width, height), (most_wide, most_high) = crop_image.size, sides
    scale = max(most_wide / width, most_high / height)
    return crop_image.resize((int(width * scale), int(height * scale)), Image.Resampling.LANCZOS)


def att_sum_crop_pipeline(
    sum_att_map: Array,
    image: Image.Image,
    *,
    top_percent: float = 0.2,
    min_keep_regions: int = 3,
    outlier_percent: float = 0.1,
    strategy: str = "attention_sum",
    save_dir: str | None = None,
) -> dict[str, Any]:
    """Mask, masked image, box and magnified crop of an image by its saliency; with `save_dir` also as five PNG files.

    Returns "crop_masked_image", "sum_att_map", "mask_map", "masked_image" and "bbox".
    """
    _check_image("image", image)
    folder = save_path_of("save_dir", save_dir)
    sum_att_map = as_array("sum_att_map", sum_att_map)
    if sum_att_map.shape != (image.height, image.width):
        raise ValueError(
            f"sum_att_map, image: expected a saliency of the image's {image.height} x {image.width} pixels, got "
            f"{checks.describe(sum_att_map)}"
        )
    mask = create_attention_mask(
        sum_att_map,
        top_percent=top_percent,
        min_keep_regions=min_keep_regions,
        outlier_percent=outlier_percent,
        strategy=strategy,
    )
    masked = apply_mask_to_image(image, mask)
    box = get_crop_bbox_from_mask(mask)
    refined = resize_crop_to_match_original(masked.crop(box), image.size)
    if folder is not None:
        marked = image.copy()
        ImageDraw.Draw(marked).rectangle(box, outline="red", width=5)
        low, spread = sum_att_map.min(), np.ptp(sum_att_map) + 1e-8
        _save(
            folder,
            sum_att_map=Image.fromarray(((sum_att_map - low) / spread * 255).astype(np.uint8)),
            mask_map=Image.fromarray(mask * np.uint8(255)),
            masked_image=masked,
            crop_masked_image=refined,
            marked_original=marked,
        )
    return {
        "crop_masked_image": refined,
        "sum_att_map": sum_att_map,
        "mask_map": mask,
        "masked_image": masked,
        "bbox": box,
    }


def _mask(mask: torch.Tensor) -> Array:
    return mask.numpy().astype(np.uint8)


def _checked_mask(mask_map: Any) -> Array:
    mask = as_array("mask_map", mask_map)
    # A mask of 255 would overflow bytes, and have no 1s to crop to.
    if mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"mask_map: expected 0 and 1 of shape [H, W], got {checks.describe(mask_map)}")
    return mask


def _check_image(name: str, image: Any) -> None:
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name}: expected a PIL image, got {checks.describe(image)}")


def _save(folder: Path, **images: Image.Image) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / f"{name}.png")
