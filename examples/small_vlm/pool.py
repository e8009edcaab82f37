"""The pool of training views: scenes drawn once, whole and through crops, stored as uint8 shards.

A crop is made as CARVE makes one: a bumpy saliency on the token grid, its top pixels or one region of them as a mask,
black outside (or not), the mask's bounding box magnified to the model's view: refined images look like training views.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from carve_kernels.models import scenes

VIEW = 96
GRID = 12
SLOTS = 8
SHARD_SCENES = 1000
VIEWS_PER_SCENE = 3
LEVEL_SHARE = (0.15, 0.2, 0.3, 0.35)
ABSENT, WHOLE, PARTIAL = 0, 1, 2


def _view(image: Image.Image, box: scenes.Box, stretch: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box of the image as the processor shows it, with scale and shift (x, y) from pixels to the view."""
    extent = np.array([box[2] - box[0], box[3] - box[1]])
    scale = np.full(2, VIEW) / (extent if stretch else extent.min())
    size = np.maximum(VIEW, np.rint(extent * scale).astype(int))
    cut = (size - VIEW) // 2
    view = image.resize(tuple(size), Image.Resampling.BICUBIC, box=box).crop((*cut, *(cut + VIEW)))
    return np.asarray(view), scale, -cut - np.array(box[:2]) * scale


def _mask(rng: np.random.Generator, target: scenes.Box) -> np.ndarray:
    """A mask like those of CARVE: the top pixels of a coarse saliency that leans towards a digit."""
    ys, xs = np.mgrid[0:GRID, 0:GRID] + 0.5
    cell = scenes.SIZE / GRID
    x, y = (target[0] + target[2]) / 2 / cell, (target[1] + target[3]) / 2 / cell
    width = max(target[2] - target[0], target[3] - target[1]) / cell * rng.uniform(0.4, 1.0)
    saliency = np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * width**2))
    saliency += rng.uniform(0, 0.25) * rng.random((GRID, GRID))
    coarse = Image.fromarray(saliency.astype(np.float32))
    pixels = np.asarray(coarse.resize((scenes.SIZE, scenes.SIZE), Image.Resampling.BILINEAR))
    mask = pixels >= np.quantile(pixels[::4, ::4], 1 - rng.uniform(0.02, 0.4))
    if rng.random() < 0.3:
        return mask
    regions, _ = ndimage.label(mask)
    under = regions[min(int(y * cell), scenes.SIZE - 1), min(int(x * cell), scenes.SIZE - 1)]
    return regions == under if under else mask


def _crop(rng: np.random.Generator, scene: scenes.Scene) -> tuple[Image.Image, np.ndarray, scenes.Box]:
    """Image, mask of visible pixels and box of a crop; half of the crops are black outside the mask."""
    mask = _mask(rng, scene.digits[rng.integers(len(scene.digits))].box)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    if rng.random() < 0.5:
        return scene.image, np.ones_like(mask), box
    pixels = np.asarray(scene.image) * mask[..., None]
    return Image.fromarray(pixels), mask, box


def view_of(
    rng: np.random.Generator, scene: scenes.Scene, whole: bool, stretch: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """One view [96, 96, 3] and its digits [8, 7]: digit, colour, x0, y0, x1, y1 in the view, state.

    The processor's centre crop cuts the ends of a crop that is not square; `stretch` makes it square instead.
    """
    image, visible, box = scene.image, np.ones((scenes.SIZE, scenes.SIZE), bool), (0, 0, scenes.SIZE, scenes.SIZE)
    if not whole:
        image, visible, box = _crop(rng, scene)
    view, scale, shift = _view(image, box, stretch)
    labels = np.zeros((SLOTS, 7), np.float32)
    for slot, placed in enumerate(scene.digits):
        x0, y0, x1, y1 = placed.box
        corners = np.array([x0, y0, x1, y1]) * np.tile(scale, 2) + np.tile(shift, 2)
        inside = np.clip(corners, 0, VIEW)
        area = (inside[2] - inside[0]) * (inside[3] - inside[1]) / ((x1 - x0) * (y1 - y0) * scale.prod())
        share = area * visible[y0:y1, x0:x1].mean()
        state = WHOLE if share > 0.9 else PARTIAL if share > 0.02 else ABSENT
        labels[slot] = (placed.digit, scenes.COLOURS.index(placed.colour), *inside, state)
    return view, labels


def draw_shard(path: Path, number: int, scene_count: int, stretch: bool) -> None:
    """Draw one shard: every scene once whole, then through crops with at least one whole digit."""
    rng = np.random.default_rng([7, number])
    views, labels = [], []
    for index in range(scene_count):
        level = int(rng.choice(scenes.LEVELS, p=LEVEL_SHARE))
        scene = scenes.draw_scene(number * SHARD_SCENES + index, level)
        for turn in range(VIEWS_PER_SCENE):
            view, label = view_of(rng, scene, turn == 0, stretch and rng.random() < 0.7)
            if not (label[:, 6] == WHOLE).any():
                view, label = view_of(rng, scene, whole=True)
            views.append(view)
            labels.append(label)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.savez(file, views=np.stack(views), labels=np.stack(labels))
    os.replace(partial, path)


def _path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:03d}.npz"


def first_stage(shards: int) -> int:
    """The number of shards for stage 1; the others, with stretched crops, are added in stage 2."""
    return (2 * shards + 2) // 3


def draw_pool(folder: Path, shards: int, scene_count: int, advance: Callable[[], None] = lambda: None) -> None:
    """Draw the missing shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = _path(folder, number)
        if not path.exists():
            draw_shard(path, number, scene_count, stretch=number >= first_stage(shards))
        advance()


def load_pool(folder: Path, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """The views [n, 96, 96, 3] uint8 and labels [n, 8, 7] of the first so many shards."""
    stored = [np.load(_path(folder, number)) for number in range(shards)]
    return np.concatenate([s["views"] for s in stored]), np.concatenate([s["labels"] for s in stored])
