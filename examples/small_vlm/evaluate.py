"""Measure an exported model and choose its profile: accuracy plain and after crops, pointing, mass, IoU, entropy.

The profile (layers, steps, keep, top, size, lam) is chosen on validation scenes, drawn with the training glyphs from
seeds that training never used; every reported number is of the test split, with its own fonts and handwriting.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from card import write_card
from model import GRID
from PIL import Image
from reader import Answers, Reader, box_tokens
from torch import Tensor

from carve_kernels import Preset, carve, zoom
from carve_kernels.models.scenes import DIGITS, GENERAL, LEVELS, SIZE, Box, Scene, Split, draw_scene

VALIDATION_SEED = 10_000_000
MINUTES = (22.0, 45.0)
STEPS = {"t_start": 0, "t_end": 1}
# The processor's centre crop cuts nothing from a square refined image; twice the side of the view is enough.
SQUARE = (192, 192)
START = Preset.paper(layers=(0,), steps="t_start", keep=0.1, top=1, size=SQUARE, general_prompt=GENERAL)


@dataclass
class Sample:
    """Scenes with the answers of the model and their maps."""

    scenes: list[Scene]
    task: Answers
    general: Answers

    @property
    def right(self) -> list[bool]:
        """Whether each plain answer is right."""
        return [word == scene.answer for word, scene in zip(self.task.words, self.scenes, strict=True)]


def ask(reader: Reader, level: int, count: int, split: Split, seed: int) -> Sample:
    """Draw the scenes of a level and ask its question and the general prompt."""
    scenes = [draw_scene(seed + index, level, split=split) for index in range(count)]
    images = [scene.image for scene in scenes]
    task = reader.answer_with_maps(images, [scene.question for scene in scenes], 4)
    return Sample(scenes, task, reader.answer_with_maps(images, None, 20))


def refine(sample: Sample, index: int, kind: str, preset: Preset) -> Image.Image:
    """The refined image of one scene; a flat map in place of the other one gives the raw or the general map."""
    layers = list(preset.layers_of(sample.task.maps.shape[1]))
    task, general = sample.task.maps[index, layers], sample.general.maps[index, layers]
    pairs = {
        "contrast": (task, general),
        "raw": (task, torch.ones_like(task)),
        "general": (general, torch.ones_like(general)),
    }
    return carve(sample.scenes[index].image, *pairs[kind], grid=(GRID, GRID), preset=preset).refined


def known_box(scene: Scene, place: np.random.Generator | None) -> Box:
    """A square around the asked digit with a margin; given a generator, a square of that size anywhere."""
    x0, y0, x1, y1 = scene.box
    side = min(SIZE, round(1.6 * max(x1 - x0, y1 - y0)))
    if place is not None:
        left, top = (int(v) for v in place.integers(0, SIZE - side + 1, 2))
    else:
        left, top = (max(0, min(SIZE - side, (low + high - side) // 2)) for low, high in ((x0, x1), (y0, y1)))
    return left, top, left + side, top + side


def share_right(reader: Reader, sample: Sample, images: list[Image.Image]) -> float:
    """Accuracy of the questions of the scenes, about other images."""
    words = reader.answer(images, [scene.question for scene in sample.scenes])
    return float(np.mean([word == scene.answer for word, scene in zip(words, sample.scenes, strict=True)]))


def accuracy(reader: Reader, sample: Sample, kind: str, preset: Preset) -> float:
    """Accuracy after the crop from one kind of map."""
    return share_right(reader, sample, [refine(sample, index, kind, preset) for index in range(len(sample.scenes))])


def choose(reader: Reader, count: int) -> tuple[Preset, list[dict[str, Any]]]:
    """The profile with the best mean accuracy on validation scenes, one group of parameters after the other."""
    crowds = [ask(reader, level, count, "train", VALIDATION_SEED) for level in LEVELS]
    depth = crowds[0].task.maps.shape[1]
    tried: list[dict[str, Any]] = []
    groups = [
        [{"layers": (layer,), "steps": steps} for steps in STEPS for layer in range(depth)],
        [{"keep": keep, "top": top} for keep in (0.05, 0.1, 0.15, 0.2, 0.4) for top in (1, 2)],
        [{"size": "longer"}, {"size": SQUARE}],
        [{"lam": lam} for lam in ("mean", 0.1, 1.0)],
    ]
    best = START
    for group in groups:
        scores = []
        for change in group:
            preset = replace(best, **change)
            scores.append(float(np.mean([accuracy(reader, crowd, "contrast", preset) for crowd in crowds])))
            tried.append({**change, "accuracy": round(scores[-1], 4)})
        best = replace(best, **group[int(np.argmax(scores))])
    return replace(best, max_new_tokens=16), tried


def described(sample: Sample) -> float:
    """Share of the digits that the general list names with the right colour."""
    shares = []
    for text, scene in zip(sample.general.texts, sample.scenes, strict=True):
        shares.append(np.mean([f"{placed.colour} {DIGITS[placed.digit]}" in text for placed in scene.digits]))
    return float(np.mean(shares))


def crops(reader: Reader, sample: Sample, profile: Preset) -> dict[str, float]:
    """Accuracy plain and after every kind of crop."""
    place = np.random.default_rng(0)
    found = {"plain": float(np.mean(sample.right)), "described": described(sample)}
    for kind in ("raw", "contrast", "general"):
        found[kind] = accuracy(reader, sample, kind, profile)
    found["contrast, lam mean"] = accuracy(reader, sample, "contrast", replace(profile, lam="mean"))
    for name, generator in (("random", place), ("perfect", None)):
        images = [zoom(s.image, None, known_box(s, generator), size=(SIZE, SIZE)) for s in sample.scenes]
        found[name] = share_right(reader, sample, images)
    for steps in STEPS:
        paper = Preset.paper(steps=steps, general_prompt=GENERAL)
        for kind in ("contrast", "raw"):
            found[f"paper {steps} {kind}"] = accuracy(reader, sample, kind, paper)
    return {name: round(value, 4) for name, value in found.items()}


def entropy(maps: Tensor) -> Tensor:
    """H / ln N of maps [..., N], renormalised over the tokens."""
    share = maps / maps.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1) / math.log(maps.shape[-1])


def pointing(sample: Sample) -> list[dict[str, float]]:
    """By layer and step, of raw map and contrast: best token in the box, mass in it, IoU of the top tokens."""
    inside = torch.from_numpy(np.stack([box_tokens(scene.box) for scene in sample.scenes]))
    rows = []
    for steps, step in STEPS.items():
        for layer in range(sample.task.maps.shape[1]):
            raw, general = sample.task.maps[:, layer, step], sample.general.maps[:, layer, step]
            row: dict[str, Any] = {"steps": steps, "layer": layer}
            for name, map_ in (("raw", raw), ("contrast", raw / (general + general.mean(-1, keepdim=True)))):
                rank = map_.argsort(-1, descending=True).argsort(-1)
                top = rank < inside.sum(-1, keepdim=True)
                row[f"{name} pointing"] = inside[rank == 0].float().mean().item()
                row[f"{name} mass"] = ((map_ * inside).sum(-1) / map_.sum(-1)).mean().item()
                row[f"{name} iou"] = ((top & inside).sum(-1) / (top | inside).sum(-1)).mean().item()
            row["task entropy"] = entropy(raw).mean().item()
            row["general entropy"] = entropy(general).mean().item()
            row["visual share"] = raw.sum(-1).mean().item()
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def evaluate(
    folder: Path, samples: int, validation: int, minutes: tuple[float, float], log: Any = print
) -> dict[str, Any]:
    """Choose the profile, measure, and write carve.json, evaluation.json and the card beside the weights."""
    reader = Reader(folder)
    profile, tried = choose(reader, validation)
    (folder / "carve.json").write_text(json.dumps(profile.to_dict(), indent=2) + "\n")
    log(f"profile: {json.dumps(profile.to_dict())}")
    result: dict[str, Any] = {
        "samples": samples, "validation_samples": validation, "profile": profile.to_dict(), "validation": tried,
        "accuracy": {}, "maps": {},
    }  # fmt: skip
    for level in LEVELS:
        sample = ask(reader, level, samples, "test", 0)
        result["accuracy"][str(level)] = crops(reader, sample, profile)
        result["maps"][str(level)] = pointing(sample)
        log(f"level {level}: {json.dumps(result['accuracy'][str(level)])}")
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    write_card(folder, result, minutes)
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported model directory")
    parser.add_argument("--samples", type=int, default=300, help="test scenes a level")
    parser.add_argument("--validation", type=int, default=60, help="validation scenes a level")
    parser.add_argument("--minutes", type=float, nargs=2, default=MINUTES, help="what the card says of the training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    evaluate(options.model, options.samples, options.validation, tuple(options.minutes))


if __name__ == "__main__":
    main()
