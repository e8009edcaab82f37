"""How good a layer and a choice of rows are, by their maps only; boxes are reported and never used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from carve_kernels.types import Box, RowsSpec, View

SCORE = "(1 - exp(-departure)) * (1 - entropy) * (between - within)"

# A general map with a zero would make the divergence infinite.
_FLOOR = 1e-6
# A token belongs to a box if a quarter of it lies in the box, or a quarter of the box in it.
_SHARE = 0.25
_MEASURES = ("departure", "entropy", "between", "within")
_REPORTS = ("pointing", "contrast_pointing", "mass")


class Choice(NamedTuple):
    """Which rows are captured, and at which steps of the answer: two fields of a Preset."""

    rows: RowsSpec
    steps: str


@dataclass(frozen=True)
class Cell:
    """One layer under one choice, with means over the questions.

    =================  ==============================================================================================
    departure          KL(task || general) of the maps as distributions over the visual tokens, in nats
    entropy            H / ln N of the task map: 1 is flat, 0 is one token
    between            the distance between the maps of different questions about one image (Jensen-Shannon over ln 2,
                       0 to 1); for an image with one question, the distance of its map to the general one
    within             the same distance between a question and its paraphrases
    score              (1 - exp(-departure)) * (1 - entropy) * (between - within)
    pointing           share of the boxes that contain the peak of the task map; None without boxes
    contrast_pointing  the same for the contrast of the preset
    mass               share of the task map inside the box
    =================  ==============================================================================================

    The score is a product, since a map must do all three: differ from the general map (1 - exp(-KL) bounds the squared
    total variation), concentrate, and change with the question but not with its wording. A constant map has
    between = 0; a noisy one has within = between.
    """

    layer: int
    rows: RowsSpec
    steps: str
    score: float
    departure: float
    entropy: float
    between: float
    within: float
    pointing: float | None = None
    contrast_pointing: float | None = None
    mass: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: rounded numbers, without unknown ones."""
        rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return {name: value for name, value in rounded.items() if value is not None}


class Tally:
    """Sums over the questions for every choice, [L, measures] and [L, reports]."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._measures: dict[Choice, list[torch.Tensor]] = {}
        self._reports: dict[Choice, list[torch.Tensor]] = {}

    def add(
        self,
        choice: Choice,
        task: torch.Tensor,
        general: torch.Tensor,
        others: Sequence[torch.Tensor],
        paraphrases: Sequence[torch.Tensor],
    ) -> None:
        """One question: its map, the general map, those of other questions and of its paraphrases, each [L, N]."""
        between = [distance(task, other) for other in others or [general]]
        within = [distance(task, paraphrase) for paraphrase in paraphrases]
        found = [divergence(task, general), spread(task), torch.stack(between).mean(0), torch.stack(within).mean(0)]
        self._measures.setdefault(choice, []).append(torch.stack(found, -1))

    def report(self, choice: Choice, task: torch.Tensor, contrast: torch.Tensor, inside: torch.Tensor) -> None:
        """How the map and the contrast [L, N] point at the tokens of a box, bool [N]."""
        mass = (task * inside).sum(-1) / task.sum(-1)
        found = [inside[task.argmax(-1)], inside[contrast.argmax(-1)], mass]
        self._reports.setdefault(choice, []).append(torch.stack([part.double() for part in found], -1))

    def cells(self, questions: int) -> list[Cell]:
        """Every layer under every choice with a map for all questions, best first."""
        found = []
        for choice, measures in self._measures.items():
            if len(measures) < questions:
                continue
            means = torch.stack(measures).mean(0).tolist()
            reports = self._reports.get(choice)
            shares = torch.stack(reports).mean(0).tolist() if reports else [[]] * len(means)
            for layer, row, share in zip(self.layers, means, shares, strict=True):
                # NaN marks a missing map, as outside of a sliding window.
                if all(map(math.isfinite, row)):
                    named = dict(zip(_MEASURES, row, strict=True)) | dict(zip(_REPORTS, share, strict=False))
                    found.append(Cell(layer, choice.rows, choice.steps, score_of(*row), **named))
        return sorted(found, key=lambda cell: -cell.score)


def score_of(departure: float, entropy: float, between: float, within: float) -> float:
    """The score of a cell; see Cell."""
    return (1 - math.exp(-departure)) * (1 - entropy) * (between - within)


def divergence(task: torch.Tensor, general: torch.Tensor) -> torch.Tensor:
    """KL(task || general) in nats of maps [..., N] as distributions over the tokens."""
    one, other = _distribution(task), _distribution(general)
    other = (1 - _FLOOR) * other + _FLOOR / other.shape[-1]
    return (torch.special.xlogy(one, one) - torch.special.xlogy(one, other)).sum(-1)


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence over ln 2 of maps [..., N]: 0 for equal, 1 for disjoint ones."""
    one, other = _distribution(one), _distribution(other)
    middle = torch.special.entr((one + other) / 2).sum(-1)
    return (middle - (torch.special.entr(one).sum(-1) + torch.special.entr(other).sum(-1)) / 2) / math.log(2)


def spread(maps: torch.Tensor) -> torch.Tensor:
    """H / ln N of maps [..., N]; 0 where there is one token."""
    total = torch.special.entr(_distribution(maps)).sum(-1)
    return total / math.log(maps.shape[-1]) if maps.shape[-1] > 1 else total


def tokens_of(boxes: Sequence[Box], views: Sequence[View]) -> torch.Tensor:
    """Which tokens of the concatenated views belong to one of the boxes: bool [N]."""
    found = []
    for view in views:
        rows, columns = view.grid
        x0, y0, x1, y1 = view.box
        inside = torch.zeros(rows, columns, dtype=torch.bool)
        cell = (x1 - x0) / columns * (y1 - y0) / rows
        for left, top, right, bottom in boxes:
            wide = _overlap(x0, x1, columns, left, right)
            high = _overlap(y0, y1, rows, top, bottom)
            inside |= high[:, None] * wide >= _SHARE * min(cell, (right - left) * (bottom - top))
        found.append(inside.flatten())
    return torch.cat(found)


def _overlap(start: float, end: float, parts: int, low: float, high: float) -> torch.Tensor:
    """The overlap of low..high with each of the equal parts of start..end."""
    edges = torch.linspace(start, end, parts + 1, dtype=torch.float64)
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0)


def _distribution(maps: torch.Tensor) -> torch.Tensor:
    maps = maps.double()
    return maps / maps.sum(-1, keepdim=True)
