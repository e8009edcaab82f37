"""Pictures for eyes: overlays of a saliency, kept regions, and a labelled panel of both. Pillow and numpy only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw, ImageFilter

from carve_kernels import checks, fonts
from carve_kernels.types import Box, Regions

_LOG = logging.getLogger("carve_kernels")

# Dark to light with even steps of lightness, so that more reads as more in grey and to colour-blind eyes too.
_ANCHORS = ((10, 8, 34), (66, 22, 104), (143, 38, 107), (211, 66, 76), (246, 127, 47), (252, 196, 74), (252, 250, 196))
_STOPS = numpy.linspace(0, 255, len(_ANCHORS))
_LUT = numpy.stack([numpy.interp(range(256), _STOPS, channel) for channel in numpy.transpose(_ANCHORS)], axis=1)
_LUT = _LUT.round().astype(numpy.uint8)

# Nobody sees more pixels than this on a page, and a panel of originals could fill the memory.
LONGEST = 1600

_INK, _SOFT, _PAPER, _TILE, _ACCENT = (28, 30, 38), (96, 100, 112), (255, 255, 255), (241, 242, 245), (255, 196, 60)


_UNREADABLE = "Characters that no font here has are shown as escapes, such as \\u732b."


class Scale(NamedTuple):
    """What the colours of a picture mean: the values at both ends, and the unit between them."""

    low: str
    high: str
    unit: str


class Tile(NamedTuple):
    """One picture of a panel, with a title above it, and below it a scale of its colours and a caption."""

    image: Image.Image | None
    title: str = ""
    caption: str = ""
    scale: Scale | None = None


def saliency_image(saliency: torch.Tensor, *, colour: bool = True) -> Image.Image:
    """A saliency [H, W] as a picture of its size, lowest value dark, highest light; a flat one is all dark."""
    levels = _levels(saliency)
    return Image.fromarray(_LUT[levels] if colour else levels)


def overlay(image: Image.Image, saliency: torch.Tensor, *, alpha: float = 0.75, box: Box | None = None) -> Image.Image:
    """A saliency or a map of tokens [h, w] laid over the part `box` of an image (None = all of it).

    The image is shown in grey and shrunk to 1600 pixels where it is larger; the higher the value, the more of the
    colour (`alpha` at the highest) and the less of the image is seen.
    """
    checks.number("alpha", alpha, low=0, high=1)
    picture = _shrink(image)
    scale_x, scale_y = picture.width / image.width, picture.height / image.height
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    left, top = round(x0 * scale_x), round(y0 * scale_y)
    size = max(1, round(x1 * scale_x) - left), max(1, round(y1 * scale_y) - top)
    levels = Image.fromarray(_levels(saliency)).resize(size, Image.Resampling.BILINEAR)
    colours = Image.fromarray(_LUT[numpy.asarray(levels)])
    base = picture.convert("L").convert("RGB")
    weight = levels.point([round(255 * alpha * (0.35 + 0.65 * (level / 255) ** 0.7)) for level in range(256)])
    base.paste(colours, (left, top), weight)
    return base


def kept(image: Image.Image, regions: Regions) -> Image.Image:
    """The image with everything outside the kept regions dimmed, their outline, their boxes and the union box."""
    picture = _shrink(image)
    mask = Image.fromarray(regions.mask.cpu().numpy()).convert("L").resize(picture.size, Image.Resampling.NEAREST)
    dimmed = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, _INK), 0.65)
    shown = Image.composite(picture, dimmed, mask)
    if regions.reason is not None:
        return shown
    line = max(1, round(max(picture.size) / 250))
    inner = mask.filter(ImageFilter.MinFilter(2 * line + 1)) if min(picture.size) > 2 * line else mask
    edge = Image.fromarray(numpy.asarray(mask) ^ numpy.asarray(inner))
    shown.paste(Image.new("RGB", picture.size, _PAPER), (0, 0), edge)
    draw = ImageDraw.Draw(shown)
    scale = picture.width / image.width, picture.height / image.height
    for box in (*regions.boxes.tolist(), regions.box):
        x0, y0, x1, y1 = (edge * scale[index % 2] for index, edge in enumerate(box))
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_ACCENT, width=line)
    return shown


def panel(
    rows: Sequence[Sequence[Tile]], *, title: str = "", caption: str = "", tile: int = 320, margin: int = 24
) -> Image.Image:
    """Rows of tiles side by side on one page, with a title and a caption for the whole; long text wraps.

    Every tile takes `tile` pixels across; a row is as high as its highest picture, `tile` at most. A tile without an
    image holds text alone. Characters that no font of this machine has become escapes, and the page says so.
    """
    checks.integer("tile", tile, low=64)
    checks.integer("margin", margin, low=0)
    if not rows or not all(rows):
        raise ValueError(f"rows: expected at least one row and one tile in each, got {checks.describe(rows)}")
    texts = [title, caption, *(text for row in rows for part in row for text in (part.title, part.caption))]
    if any(fonts.unreadable(text) for text in texts):
        _LOG.warning("panel: no font here has some characters of the text; they are shown as escapes")
        caption = f"{caption}\n{_UNREADABLE}".strip()
    width = margin + max(len(row) for row in rows) * (tile + margin)
    inner = width - 2 * margin
    blocks: list[Image.Image] = []
    if title:
        blocks.append(_text(title, inner, tile // 13, _INK))
    if caption:
        blocks.append(_text(caption, inner, tile // 20, _SOFT))
    blocks += [_row(row, inner, tile, margin) for row in rows]
    gaps = [margin // 2 if index == 0 and title and caption else margin for index in range(len(blocks))]
    page = Image.new("RGB", (width, margin + sum(block.height for block in blocks) + sum(gaps)), _PAPER)
    y = margin
    for block, gap in zip(blocks, gaps, strict=True):
        page.paste(block, (margin, y))
        y += block.height + gap
    return page


def _row(tiles: Sequence[Tile], width: int, tile: int, margin: int) -> Image.Image:
    titles = [_text(part.title, tile, tile // 18, _INK) for part in tiles]
    pictures = [_fit(part.image, tile) for part in tiles]
    captions = [_below(part, tile) for part in tiles]
    above = max(text.height for text in titles) + margin // 4
    high = max((picture.height for picture in pictures if picture), default=0)
    below = max(text.height for text in captions)
    block = Image.new("RGB", (width, above + high + margin // 3 + below), _PAPER)
    for index, (title, picture, caption) in enumerate(zip(titles, pictures, captions, strict=True)):
        x = index * (tile + margin)
        block.paste(title, (x, above - margin // 4 - title.height))
        if picture:
            block.paste(_TILE, (x, above, x + tile, above + high))
            block.paste(picture, (x + (tile - picture.width) // 2, above + (high - picture.height) // 2))
        block.paste(caption, (x, above + high + margin // 3 if picture else above))
    return block


def _below(part: Tile, width: int) -> Image.Image:
    """The caption of a tile, below the scale of its colours where it has one."""
    size = width // 21
    caption = _text(part.caption, width, size, _SOFT)
    if part.scale is None:
        return caption
    bar = Image.fromarray(_LUT[None]).resize((width, max(6, width // 40)))
    ends = _text("x", width, size, _PAPER)
    draw, size = ImageDraw.Draw(ends), max(size, 12)
    for text, share in ((part.scale.low, 0.0), (part.scale.unit, 0.5), (part.scale.high, 1.0)):
        fonts.draw(draw, (round((width - fonts.length(text, size)) * share), 0), text, size, _SOFT)
    block = Image.new("RGB", (width, bar.height + 4 + ends.height + caption.height), _PAPER)
    block.paste(bar, (0, 0))
    block.paste(ends, (0, bar.height + 4))
    block.paste(caption, (0, bar.height + 4 + ends.height))
    return block


def _fit(image: Image.Image | None, tile: int) -> Image.Image | None:
    """An image that fills a square tile in one direction; enlarged pixels stay crisp when there are few."""
    if image is None:
        return None
    scale = tile / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    method = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method, reducing_gap=3.0 if scale < 0.25 else None)


def _text(text: str, width: int, size: int, colour: tuple[int, int, int]) -> Image.Image:
    """Text of a readable size wrapped to a width; nothing takes no room."""
    size = max(size, 12)
    lines = [line for paragraph in fonts.legible(text).splitlines() for line in _wrap(paragraph, width, size)]
    step = round(size * 1.35)
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


def _levels(saliency: torch.Tensor) -> numpy.ndarray:
    """A map [H, W] on 0 to 255, from its lowest value to its highest."""
    checks.tensor("saliency", saliency, shape=("H", "W"), dtypes=(torch.float32, torch.float64))
    values = saliency.detach().cpu().numpy()
    low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
    if not numpy.isfinite([low, high]).all():
        raise ValueError(f"saliency: expected finite values, got values from {low} to {high}")
    span = high - low
    return (255 * (values - low) / (span if span > 0 else 1)).round().astype(numpy.uint8)


def _shrink(image: Image.Image) -> Image.Image:
    """The image in RGB with its longer side at 1600 pixels or fewer."""
    scale = LONGEST / max(image.size)
    if scale >= 1:
        return image.convert("RGB")
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BOX, reducing_gap=2.0).convert("RGB")
