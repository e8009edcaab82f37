"""The public `zoom`, and checks of images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from carve_kernels import checks, extras
from carve_kernels.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image

RESAMPLE = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
SIZES = ("longer", "cover")

_ORIENTATION = 0x0112

_Number = TypeVar("_Number", int, float)

_log = logging.getLogger("carve_kernels")


def zoom(
    image: Image,
    mask: torch.Tensor | None,
    box: Sequence[int],
    *,
    fill: Sequence[int] = (0, 0, 0),
    resample: str = "lanczos",
    size: str | Size = "longer",
    limit: float = 4.0,
) -> Image:
    """Fill the pixels outside the mask, crop to the box and magnify the rest.

    Equals, with the `scale` that follows from `size`::

        pixels = numpy.where(mask[..., None], image, fill)[y0:y1, x0:x1]
        refined = Image.fromarray(pixels).resize((round(w * scale), round(h * scale)), resample)

    ========  ===================  ======  ======================================================================
    name      type                 shape   meaning
    ========  ===================  ======  ======================================================================
    image     PIL image                    any 8- or 16-bit mode; transparency is laid on white
    mask      bool tensor or None  [H, W]  the pixels that remain; None = all
    box       int                  4       x0 y0 x1 y1 inside the image, x1 y1 exclusive
    fill      int                  3       colour outside the mask
    resample  str                          "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos"
    size      str or int           (h, w)  "longer": the longer side reaches the image's longer side (the paper);
                                           "cover": both sides reach the image's, each cut to int (the release);
                                           or exactly (h, w)
    limit     float                        the most pixels of the result, as a multiple of the image's
    (result)  PIL image, RGB
    ========  ===================  ======  ======================================================================

    "longer" and "cover" keep the aspect. A size beyond `limit` is reduced in its aspect, and logged: only then is the
    longer side ("longer"), one side ("cover") or an exact side short by more than a pixel. The caller must apply the
    image's EXIF orientation.

    Raises TypeError or ValueError for an argument of the wrong kind, shape or range: a mask of another size than the
    image, a box outside it, a mode without a fixed range (float).

    Source: the refinement step of CARVE (arXiv 2509.06461); resampling, `limit` and exact sizes are ours.
    """
    rgb = to_rgb("image", image)
    width, height = rgb.size
    x0, y0, x1, y1 = check_box(box, rgb.size, checks.integer)
    colour(fill)
    checks.choice("resample", resample, RESAMPLE)
    target = _target((y1 - y0, x1 - x0), (height, width), size, checks.number("limit", limit, low=1))

    from PIL import Image

    crop = rgb.crop((x0, y0, x1, y1))
    if mask is not None:
        checks.tensor("mask", mask, shape=("H", "W"), dtypes=(torch.bool,))
        if tuple(mask.shape) != (height, width):
            raise ValueError(
                f"mask: expected {height} x {width} (rows x columns) like the image, "
                f"got {mask.shape[0]} x {mask.shape[1]}"
            )
        inside = Image.fromarray(mask[y0:y1, x0:x1].cpu().numpy().astype("uint8") * 255)
        crop = Image.composite(crop, Image.new("RGB", crop.size, tuple(fill)), inside)
    return crop.resize((target[1], target[0]), Image.Resampling[resample.upper()])


def to_rgb(name: str, image: Any) -> Image:
    """Check an image and convert it to 8-bit RGB: transparency on white, 16 bits scaled to 8; RGB unchanged."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        with extras.needed_by("zoom"):
            raise
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name}: expected a PIL image, got {checks.describe(image)}")
    if min(image.size) < 1:
        raise ValueError(f"{name}: expected at least one pixel, got {image.width} x {image.height}")
    if image.mode == "F":
        raise ValueError(f"{name}: expected an 8- or 16-bit mode such as RGB, got F, floating-point of unknown range")
    if image.mode.startswith("I"):
        import numpy

        # Pillow would clip these to 255; a file of 16 bits may be decoded to 32.
        image = Image.fromarray((numpy.asarray(image).clip(0, 65535) >> 8).astype("uint8"))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image: Image) -> int:
    """The EXIF orientation of a loaded image: 1 is upright, 2 to 8 are rotated or mirrored."""
    # Some decoders apply the orientation.
    image.load()
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        # Unreadable EXIF counts as upright.
        return 1
    return int(value) if value in range(1, 9) else 1


def refuse_turned(name: str, image: Image) -> None:
    """Raise ValueError for an EXIF orientation: whether the maps are of the rotated pixels is unknown."""
    turned = orientation(image)
    if turned > 1:
        raise ValueError(
            f"{name}: expected an upright image, got one with EXIF orientation {turned}; whether the processor "
            "applied it is unknown, so apply it before the processor: PIL.ImageOps.exif_transpose(image)"
        )


def colour(fill: Any) -> tuple[int, ...]:
    """Check the three values of a colour."""
    if not isinstance(fill, Sequence) or isinstance(fill, str) or len(fill) != 3:
        raise TypeError(f"fill: expected three values (red, green, blue), got {checks.describe(fill)}")
    return tuple(checks.integer(f"fill[{index}]", value, low=0, high=255) for index, value in enumerate(fill))


def check_box(
    box: Any, size: tuple[int, int], number: Callable[[str, Any], _Number], slack: float = 0.0
) -> tuple[_Number, _Number, _Number, _Number]:
    """Check the four edges of a box, each with `number`, in an image of (width, height), up to `slack` pixels."""
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        kind = "integers" if number is checks.integer else "numbers"
        raise TypeError(f"box: expected four {kind} (x0, y0, x1, y1), got {checks.describe(box)}")
    x0, y0, x1, y1 = (number(f"box[{index}]", edge) for index, edge in enumerate(box))
    width, height = size
    if not (-slack <= x0 < x1 <= width + slack and -slack <= y0 < y1 <= height + slack):
        raise ValueError(
            f"box: expected 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height} for an image {width} wide and "
            f"{height} high, got {(x0, y0, x1, y1)}"
        )
    return x0, y0, x1, y1


def _target(crop: Size, whole: Size, size: str | Size, limit: float) -> Size:
    """The (height, width) to magnify a crop of an image to."""
    height, width = crop
    most = limit * whole[0] * whole[1]
    if not isinstance(size, str):
        height, width = wanted = checks.size("size", size)
    elif checks.choice("size", size, SIZES) == "longer":
        scale = max(whole) / max(crop)
        wanted = round(height * scale), round(width * scale)
    else:
        scale = max(whole[1] / width, whole[0] / height)
        wanted = int(height * scale), int(width * scale)
    if wanted[0] * wanted[1] > most:
        scale = math.sqrt(most / (height * width))
        rows = max(1, min(int(height * scale), int(most)))
        wanted = rows, max(1, min(int(width * scale), int(most) // rows))
        _log.info("zoom: %s capped at %s, %g times the image's pixels", size, wanted, limit)
    return wanted
