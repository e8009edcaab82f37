"""Scenes of coloured digits among clutter: the training and test data of the embedded small model.

A scene depends only on (seed, level, split). Its image is 384 x 384 while the model sees 96 x 96, so that a crop shows
details that the model did not see. Levels range from 2 large digits to 8 of the size of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from carve_kernels.extras import needed_by

with needed_by("carve_kernels.models.scenes"):
    from PIL import Image, ImageDraw

SIZE = 384
LEVELS = (1, 2, 3, 4)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PALETTE = {
    "red": (235, 40, 40),
    "green": (45, 200, 60),
    "blue": (60, 90, 250),
    "yellow": (240, 225, 50),
    "cyan": (50, 220, 225),
    "pink": (250, 90, 210),
    "orange": (250, 140, 30),
    "white": (245, 245, 245),
}
COLOURS = tuple(PALETTE)
GENERAL = "describe the image"

Split = Literal["train", "test"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Level:
    """The content of a scene: digits, their height in pixels, letters, strokes, strength of the texture."""

    digits: int
    height: tuple[int, int]
    letters: int
    strokes: int
    texture: int


_LEVELS = {
    1: Level(digits=2, height=(96, 140), letters=1, strokes=2, texture=12),
    2: Level(digits=4, height=(62, 88), letters=4, strokes=5, texture=18),
    3: Level(digits=6, height=(44, 58), letters=9, strokes=9, texture=24),
    4: Level(digits=8, height=(31, 37), letters=16, strokes=14, texture=30),
}


@dataclass(frozen=True)
class Placed:
    """One digit of a scene: its value, its colour's name and its box in pixels."""

    digit: int
    colour: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """An image, a question with its one-word answer, the general answer, and the boxes of the digits."""

    image: Image.Image
    question: str
    answer: str
    general: str
    box: Box
    digits: tuple[Placed, ...]


@lru_cache(maxsize=1)
def _atlas() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "glyphs.npz") as stored:
        return {name: stored[name] for name in stored.files}


def _pick(rng: np.random.Generator, kind: str, split: Split, value: int | None = None) -> np.ndarray:
    """A random glyph (alpha, uint8) of a kind; `value` chooses the digit. Test glyphs are never drawn in training."""
    atlas = _atlas()
    usable = atlas[f"{kind}_test"] == (split == "test")
    if value is not None:
        usable &= atlas[f"{kind}_value"] == value
    return atlas[kind][rng.choice(np.flatnonzero(usable))]


def _stamp(rng: np.random.Generator, glyph: np.ndarray, height: int, tilt: float) -> Image.Image:
    """The glyph as a mask, tilted, trimmed to its ink and scaled to `height` pixels."""
    side = 2 * height
    ink = Image.fromarray(glyph).resize((side, side), Image.Resampling.BICUBIC)
    ink = ink.rotate(float(rng.uniform(-tilt, tilt)), Image.Resampling.BILINEAR)
    ink = ink.point([min(255, max(0, 2 * value - 110)) for value in range(256)])
    ink = ink.crop(ink.getbbox())
    scale = height / max(ink.size)
    return ink.resize((max(3, round(ink.width * scale)), max(3, round(ink.height * scale))), Image.Resampling.BILINEAR)


def _muted(rng: np.random.Generator) -> tuple[int, int, int]:
    """A clutter colour: a palette colour mixed into a grey, so that it differs from the colour itself."""
    grey = rng.uniform(70, 190)
    share = rng.uniform(0.0, 0.35)
    tint = PALETTE[COLOURS[rng.integers(len(COLOURS))]]
    red, green, blue = (int(grey * (1 - share) + share * channel) for channel in tint)
    return red, green, blue


def _background(rng: np.random.Generator, texture: int) -> Image.Image:
    base = rng.uniform(15, 75) + rng.uniform(-10, 10, 3)
    cells = int(rng.choice([8, 16, 32, 64]))
    cloud = base + texture * rng.standard_normal((cells, cells, 1)) + 4 * rng.standard_normal((cells, cells, 3))
    coarse = Image.fromarray(np.clip(cloud, 0, 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    grain = rng.integers(0, max(2, texture), (SIZE, SIZE, 1), dtype=np.uint8)
    return Image.fromarray(np.minimum(np.asarray(coarse), 255 - texture) + grain)


def _place(rng: np.random.Generator, size: tuple[int, int], others: list[Box], margin: int) -> Box | None:
    """A random box of this size that does not overlap the others, or None after many tries."""
    for _ in range(200):
        x, y = (int(rng.integers(2, SIZE - side - 1)) for side in size)
        x1, y1 = x + size[0], y + size[1]
        if all(
            x1 + margin <= left or right <= x - margin or y1 + margin <= top or bottom <= y - margin
            for left, top, right, bottom in others
        ):
            return x, y, x1, y1
    return None


def _digits(rng: np.random.Generator, level: Level, split: Split) -> list[tuple[Placed, Image.Image]]:
    """The digits of a scene with their masks; starts again when the last ones do not fit."""
    while True:
        colours = rng.permutation(len(COLOURS))[: level.digits]
        placed_masks: list[tuple[Placed, Image.Image]] = []
        for colour in colours:
            digit = int(rng.integers(10))
            kind = "handwriting" if rng.random() < 0.5 else "digits"
            mask = _stamp(rng, _pick(rng, kind, split, digit), int(rng.integers(*level.height)), 10)
            box = _place(rng, mask.size, [placed.box for placed, _ in placed_masks], 4)
            if box is None:
                break
            placed_masks.append((Placed(digit, COLOURS[colour], box), mask))
        if len(placed_masks) == level.digits:
            return placed_masks


def draw_scene(seed: int, level: int, *, split: Split = "train") -> Scene:
    """Draw the scene of this seed and level; `split="test"` uses fonts and handwriting held out from training."""
    if level not in _LEVELS:
        raise ValueError(f"level: expected one of {LEVELS}, got {level!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    rng = np.random.default_rng([seed, level, split == "test"])
    plan = _LEVELS[level]
    image = _background(rng, plan.texture)
    canvas = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(plan.strokes // 2, plan.strokes + 1))):
        start, length = rng.integers(0, SIZE, 2), rng.integers(-120, 121, 2)
        canvas.line([*start.tolist(), *(start + length).tolist()], fill=_muted(rng), width=int(rng.integers(1, 6)))

    digits = _digits(rng, plan, split)
    boxes = [placed.box for placed, _ in digits]
    for _ in range(int(rng.integers(plan.letters // 2, plan.letters + 1))):
        letter = _stamp(rng, _pick(rng, "letters", split), int(rng.integers(*plan.height)), 25)
        box = _place(rng, letter.size, boxes, 2)
        if box is not None:
            boxes.append(box)
            image.paste(_muted(rng), box, letter)
    for placed, mask in digits:
        jitter = rng.integers(-14, 15, 3)
        red, green, blue = (int(np.clip(c + j, 0, 255)) for c, j in zip(PALETTE[placed.colour], jitter, strict=True))
        image.paste((red, green, blue), placed.box, mask)

    placed_digits = tuple(placed for placed, _ in digits)
    target = placed_digits[rng.integers(len(placed_digits))]
    order = rng.permutation(len(placed_digits))
    general = " ".join(f"{placed_digits[i].colour} {DIGITS[placed_digits[i].digit]}" for i in order)
    return Scene(image, f"what digit is {target.colour}", DIGITS[target.digit], general, target.box, placed_digits)
