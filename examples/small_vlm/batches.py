"""Training batches: views with small shifts and changes of brightness, patch targets, packed questions and answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from forward import GENERAL_WIDTH, QUESTION_WIDTH, QUESTIONS, SUFFIX
from model import GRID, ID, IMAGE, PATCH
from pool import PARTIAL, VIEWS_PER_SCENE, WHOLE
from torch import Tensor

from carve_kernels.models.scenes import COLOURS, DIGITS

DIGIT_IDS = [ID[word] for word in DIGITS]
COLOUR_IDS = [ID[word] for word in COLOURS]
NOTHING = 10
IGNORE = -100
SHIFT = 4


@dataclass
class Batch:
    """Images [B, M, 3, 96, 96]; digit and colour of each patch; suffix and its next words [B, SUFFIX]."""

    pixels: Tensor
    patch_digit: Tensor
    patch_colour: Tensor
    suffix: Tensor
    target: Tensor


def _patch_targets(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digit (10 = nothing) and colour of each patch; patches with only an edge of a digit are ignored."""
    count = len(labels)
    digit = np.full((count, GRID, GRID), NOTHING)
    colour = np.full((count, GRID, GRID), IGNORE)
    low, centre, high = (np.arange(GRID) * PATCH + offset for offset in (0, PATCH / 2, PATCH))
    value, tint, x0, y0, x1, y1, state = np.moveaxis(labels, -1, 0)[..., None]
    touched = ((low < y1) & (high > y0))[..., None] & ((low < x1) & (high > x0))[..., None, :]
    touched &= (state != 0)[..., None]
    middle_y, middle_x = (y0 + y1) / 2, (x0 + x1) / 2
    rows = ((centre >= y0) & (centre <= y1)) | ((low <= middle_y) & (middle_y < high))
    columns = ((centre >= x0) & (centre <= x1)) | ((low <= middle_x) & (middle_x < high))
    inner = rows[..., None] & columns[..., None, :] & (state == WHOLE)[..., None]
    digit[touched.any(1)] = IGNORE
    for slot in range(labels.shape[1]):
        batch, row, column = np.nonzero(inner[:, slot])
        digit[batch, row, column] = value[batch, slot, 0]
        colour[batch, row, column] = tint[batch, slot, 0]
    return digit.reshape(count, -1), colour.reshape(count, -1)


def _pack(rng: np.random.Generator, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Questions about some digits [n, 7] and the general list of all, with the next word at each position."""
    suffix, target = np.zeros(SUFFIX, int), np.full(SUFFIX, IGNORE)
    ask = [ID["what"], ID["digit"], ID["is"]]
    for turn, row in enumerate(rng.permutation(len(whole))[:QUESTIONS]):
        at, answer = turn * QUESTION_WIDTH, DIGIT_IDS[int(whole[row, 0])]
        suffix[at : at + QUESTION_WIDTH] = [*ask, COLOUR_IDS[int(whole[row, 1])], answer]
        target[at + 3 : at + 5] = [answer, ID["<eos>"]]
    pairs = [word for row in rng.permutation(len(whole)) for word in _pair(whole[row])]
    at = SUFFIX - GENERAL_WIDTH
    suffix[at : at + 3] = [ID["describe"], ID["the"], ID["image"]]
    suffix[at + 3 : at + 3 + len(pairs)] = pairs
    target[at + 2 : at + 3 + len(pairs)] = [*pairs, ID["<eos>"]]
    return suffix, target


def _pair(label: np.ndarray) -> tuple[int, int]:
    return COLOUR_IDS[int(label[1])], DIGIT_IDS[int(label[0])]


class Sampler:
    """Draws batches from the pool."""

    def __init__(self, views: np.ndarray, labels: np.ndarray, seed: int) -> None:
        self.views, self.labels = views, labels
        self.rng = np.random.default_rng(seed)

    def _load(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Views [n, 96, 96, 3] in [-1, 1] and their labels, with random shifts and brightness."""
        count, positions = len(chosen), np.arange(IMAGE)
        shift = self.rng.integers(-SHIFT, SHIFT + 1, (count, 2))
        xs, ys = (np.clip(positions + shift[:, axis, None], 0, IMAGE - 1) for axis in (0, 1))
        pixels = self.views[chosen[:, None, None], ys[:, :, None], xs[:, None, :]].astype(np.float32)
        light = self.rng.uniform(0.85, 1.1, (count, 1, 1, 1)) * self.rng.uniform(0.95, 1.05, (count, 1, 1, 3))
        pixels = np.clip(pixels * light.astype(np.float32), 0, 255) / 127.5 - 1
        labels = self.labels[chosen].copy()
        corners = labels[..., 2:6] - np.concatenate([shift, shift], 1)[:, None]
        inside = np.clip(corners, 0, IMAGE)
        cut = (np.abs(inside - corners) > 1.5).any(-1) & (labels[..., 6] == WHOLE)
        labels[..., 6] = np.where(cut, PARTIAL, labels[..., 6])
        labels[..., 2:6] = inside
        return pixels, labels

    def batch(self, size: int, images: int = 1) -> Batch:
        """`size` prompts with one image, or with the whole view and a crop of the same scene."""
        if images == 1:
            chosen = self.rng.integers(0, len(self.views), size)
        else:
            first = self.rng.integers(0, len(self.views) // VIEWS_PER_SCENE, size) * VIEWS_PER_SCENE
            chosen = np.stack([first, first + self.rng.integers(1, VIEWS_PER_SCENE, size)], 1).ravel()
        pixels, labels = self._load(chosen)
        digit, colour = _patch_targets(labels)
        packed = [_pack(self.rng, row[row[:, 6] == WHOLE]) for row in labels[::images]]
        shaped = torch.from_numpy(pixels).permute(0, 3, 1, 2).reshape(size, images, 3, IMAGE, IMAGE)
        return Batch(
            shaped,
            torch.from_numpy(digit).reshape(size, -1),
            torch.from_numpy(colour).reshape(size, -1),
            torch.from_numpy(np.stack([s for s, _ in packed])),
            torch.from_numpy(np.stack([t for _, t in packed])),
        )
