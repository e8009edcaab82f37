"""Images of results: overlays of a saliency, the selected regions, and labelled panels. Pillow and numpy only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from carve_kernels import checks, fonts
from carve_kernels.types import Box, Regions

_LOG = logging.getLogger("carve_kernels")

# Dark to light with even steps of lightness, so that the order is visible in grey and to colour-blind readers.
_ANCHORS = ((10, 8, 34), (66, 22, 104), (143, 38, 107), (211, 66, 76), (246, 127, 47), (252, 196, 74), (252, 250, 196))
_STOPS = numpy.linspace(0, 255, len(_ANCHORS))
_LUT = numpy.stack([numpy.interp(range(256), _STOPS, channel) for channel in numpy.transpose(_ANCHORS)], axis=1)
_LUT = _LUT.round().astype(numpy.uint8)

# More pixels are not visible on a page, and a panel of originals could fill the memory.
LONGEST = 1600

_INK, _SOFT, _PAPER, _TILE, _ACCENT = (28, 30, 38), (96, 100, 112), (255, 255, 255), (241, 242, 245), (255, 196, 60)
_HATCH = (150, 110)
_LINE_HEIGHT = 1.35

_UNREADABLE = "Characters that no font of this machine has are drawn as escapes, such as \\u732b."


class Scale(NamedTuple):
    """The colour scale of an image: the values at both ends, and the unit between them."""

    low: str
    high: str
    unit: str


class Tile(NamedTuple):
    """One tile of a panel: an image with a title above it, and a colour scale and a caption below it."""

    image: Image.Image | None
    title: str = ""
    caption: str = ""
    scale: Scale | None = None


def saliency_image(saliency: torch.Tensor, *, colour: bool = True, seen: torch.Tensor | None = None) -> Image.Image:
    """A saliency [H, W] as an image of its size, lowest value dark, highest light; a flat one is all dark.

    Pixels that are not `seen` (bool [H, W], None = all are) are hatched in grey, and no part of the range.
    """
    levels = _levels(saliency, seen)
    return _hatched(Image.fromarray(_LUT[levels] if colour else levels), seen)


def overlay(
    image: Image.Image,
    saliency: torch.Tensor,
    *,
    alpha: float = 0.75,
    box: Box | None = None,
    seen: torch.Tensor | None = None,
    ends: tuple[float, float] | None = None,
) -> Image.Image:
    """A saliency or a map of tokens [h, w] over the part `box` of an image (None = all of it).

    The image is grey and at most 1600 pixels a side; the higher the value, the stronger the colour (`alpha` at the
    highest). Pixels of the image that are not `seen` (bool [H, W], None = all are) are hatched; of a saliency of the
    whole image they are no part of the range. `ends` are the values of the darkest and the lightest colour, as for the
    frames of one video (None = the lowest and the highest value).

    Raises TypeError or ValueError for an image that is not a PIL image, a saliency that is not a finite float32 or
    float64 [h, w], and for numbers out of range.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: expected a PIL image, got {checks.describe(image)}")
    checks.number("alpha", alpha, low=0, high=1)
    if box is not None:
        checks.numbers("box", box, ("x0", "y0", "x1", "y1"), checks.number)
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"box: expected x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {checks.describe(box)}")
    if ends is not None:
        checks.numbers("ends", ends, ("lowest", "highest"), checks.number)
        if ends[0] > ends[1]:
            raise ValueError(f"ends: expected the lower value first, got {checks.describe(ends)}")
    if seen is not None:
        checks.tensor("seen", seen, shape=(image.height, image.width), dtypes=(torch.bool,))
    small = _shrink(image)
    scale_x, scale_y = small.width / image.width, small.height / image.height
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    left, top = round(x0 * scale_x), round(y0 * scale_y)
    size = max(1, round(x1 * scale_x) - left), max(1, round(y1 * scale_y) - top)
    covered = seen if seen is not None and seen.shape == saliency.shape else None
    levels = Image.fromarray(_levels(saliency, covered, ends)).resize(size, Image.Resampling.BILINEAR)
    colours = Image.fromarray(_LUT[numpy.asarray(levels)])
    base = small.convert("L").convert("RGB")
    weight = levels.point([round(255 * alpha * (0.35 + 0.65 * (level / 255) ** 0.7)) for level in range(256)])
    base.paste(colours, (left, top), weight)
    return _hatched(base, seen)


def kept(image: Image.Image, regions: Regions, *, seen: torch.Tensor | None = None) -> Image.Image:
    """The image dimmed outside the selected regions, with their outlines, their boxes and the union box.

    Pixels that are not `seen` (bool [H, W], None = all are) are hatched.
    """
    small = _shrink(image)
    mask = Image.fromarray(regions.mask.cpu().numpy()).convert("L").resize(small.size, Image.Resampling.NEAREST)
    dimmed = Image.blend(small.convert("L").convert("RGB"), Image.new("RGB", small.size, _INK), 0.65)
    figure = Image.composite(small, _hatched(dimmed, seen), mask)
    if regions.reason is not None:
        return figure
    line = max(1, round(max(small.size) / 250))
    inner = mask.filter(ImageFilter.MinFilter(2 * line + 1)) if min(small.size) > 2 * line else mask
    edge = Image.fromarray(numpy.asarray(mask) ^ numpy.asarray(inner))
    figure.paste(Image.new("RGB", small.size, _PAPER), (0, 0), edge)
    draw = ImageDraw.Draw(figure)
    scale = small.width / image.width, small.height / image.height
    for box in (*regions.boxes.tolist(), regions.box):
        x0, y0, x1, y1 = (edge * scale[index % 2] for index, edge in enumerate(box))
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_ACCENT, width=line)
    return figure


def panel(
    rows: Sequence[Sequence[Tile]], *, title: str = "", caption: str = "", tile: int = 320, margin: int = 24
) -> Image.Image:
    """Rows of tiles on one page, with a title and a caption for the page; long text wraps.

    Every tile is `tile` pixels wide; a row is as high as its highest image, at most `tile`. A tile without an image is
    text alone. Characters that no font of this machine has become escapes, and the page says so.
    """
    checks.integer("tile", tile, low=64)
    checks.integer("margin", margin, low=0)
    if not rows or not all(rows):
        raise ValueError(f"rows: expected at least one row and one tile in each, got {checks.describe(rows)}")
    texts = [title, caption, *(text for row in rows for cell in row for text in (cell.title, cell.caption))]
    if any(fonts.unreadable(text) for text in texts):
        _LOG.warning("panel: no font of this machine has some characters of the text; they are drawn as escapes")
        caption = f"{caption}\n{_UNREADABLE}".strip()
    width = max(len(row) for row in rows) * (tile + margin) - margin
    heads = [_text(title, width, tile // 13, _INK), _text(caption, width, tile // 20, _SOFT)]
    head = _stack([block for block in heads if block.height], width, margin // 2)
    blocks = [_row(row, width, tile, margin) for row in rows]
    return ImageOps.expand(_stack([head, *blocks] if head.height else blocks, width, margin), margin, _PAPER)


def _stack(blocks: Sequence[Image.Image], width: int, gap: int = 0) -> Image.Image:
    """Blocks of this width, one below the other."""
    page = Image.new("RGB", (width, sum(block.height + gap for block in blocks) - gap * bool(blocks)), _PAPER)
    y = 0
    for block in blocks:
        page.paste(block, (0, y))
        y += block.height + gap
    return page


def _row(cells: Sequence[Tile], width: int, tile: int, margin: int) -> Image.Image:
    titles = [_text(cell.title, tile, tile // 18, _INK) for cell in cells]
    images = [_fit(cell.image, tile) for cell in cells]
    captions = [_below(cell, tile) for cell in cells]
    above = max(text.height for text in titles) + margin // 4
    high = max((image.height for image in images if image), default=0)
    below = max(text.height for text in captions)
    block = Image.new("RGB", (width, above + high + margin // 3 + below), _PAPER)
    for index, (title, image, caption) in enumerate(zip(titles, images, captions, strict=True)):
        x = index * (tile + margin)
        block.paste(title, (x, above - margin // 4 - title.height))
        if image:
            block.paste(_TILE, (x, above, x + tile, above + high))
            block.paste(image, (x + (tile - image.width) // 2, above + (high - image.height) // 2))
        block.paste(caption, (x, above + high + margin // 3 if image else above))
    return block


def _below(cell: Tile, width: int) -> Image.Image:
    """The caption of a tile, below its colour scale where it has one."""
    caption = _text(cell.caption, width, width // 21, _SOFT)
    if cell.scale is None:
        return caption
    size = max(width // 21, 12)
    bar = Image.fromarray(_LUT[None]).resize((width, max(6, width // 40)))
    ends = Image.new("RGB", (width, 4 + round(size * _LINE_HEIGHT)), _PAPER)
    for text, share in ((cell.scale.low, 0.0), (cell.scale.unit, 0.5), (cell.scale.high, 1.0)):
        x = round((width - fonts.length(text, size)) * share)
        fonts.draw(ImageDraw.Draw(ends), (x, 4), text, size, _SOFT)
    return _stack([bar, ends, caption], width)


def _fit(image: Image.Image | None, tile: int) -> Image.Image | None:
    """An image that fills a square tile in one direction; a few large pixels stay crisp."""
    if image is None:
        return None
    scale = tile / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    method = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method, reducing_gap=3.0 if scale < 0.25 else None)


def _text(text: str, width: int, size: int, colour: tuple[int, int, int]) -> Image.Image:
    """Text of a readable size wrapped to a width; an empty text has no height."""
    size = max(size, 12)
    lines = [line for paragraph in fonts.legible(text).splitlines() for line in _wrap(paragraph, width, size)]
    step = round(size * _LINE_HEIGHT)
    block = Image.new("RGB", (width, step * len(lines)), _PAPER)
    draw = ImageDraw.Draw(block)
    for index, line in enumerate(lines):
        fonts.draw(draw, (0, index * step), line, size, colour)
    return block


def _wrap(text: str, width: int, size: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fonts.length(longer, size) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if fonts.length(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _levels(
    saliency: torch.Tensor, seen: torch.Tensor | None = None, ends: tuple[float, float] | None = None
) -> numpy.ndarray:
    """A map [H, W] scaled to 0 to 255, from the lowest value of its seen pixels to their highest, or between `ends`."""
    checks.tensor("saliency", saliency, shape=("H", "W"), dtypes=(torch.float32, torch.float64))
    values = saliency.detach().cpu().numpy()
    visible = values if seen is None else values[seen.cpu().numpy()]
    low, high = (visible.min(), visible.max()) if visible.size else (0.0, 0.0)
    if not numpy.isfinite([low, high]).all():
        raise ValueError(f"saliency: expected finite values, got values from {low} to {high}")
    low, high = ends or (low, high)
    span = high - low
    scaled = 255 * (values - low) / (span if span > 0 else 1)
    return scaled.round().clip(0, 255).astype(numpy.uint8)


def _hatched(image: Image.Image, seen: torch.Tensor | None) -> Image.Image:
    """An image with grey diagonals over the pixels that are not seen; the image itself where all are."""
    if seen is None or bool(seen.all()):
        return image
    unseen = Image.fromarray(~seen.cpu().numpy()).convert("L").resize(image.size, Image.Resampling.NEAREST)
    rows, columns = numpy.ogrid[: image.height, : image.width]
    period = max(4, max(image.size) // 100)
    stripes = (rows + columns) % period < period // 2
    hatch = numpy.where(stripes, *_HATCH).astype(numpy.uint8)
    return Image.composite(Image.fromarray(hatch).convert(image.mode), image, unseen)


def _shrink(image: Image.Image) -> Image.Image:
    """The image in RGB with at most 1600 pixels on its longer side."""
    scale = LONGEST / max(image.size)
    if scale >= 1:
        return image.convert("RGB")
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BOX, reducing_gap=2.0).convert("RGB")
