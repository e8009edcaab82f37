"""Measure the recipes of carve_kernels.frontends.recipes on the embedded model, beside plain answers and CARVE.

    python examples/small_vlm/recipes.py

Heads are chosen on scenes with the training glyphs; every number is of test scenes. The threshold of an unsure answer,
the windows of peaks and what is kept are no choices of this script: 0.9, a quarter of the side, and carve.json's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from evaluate import VALIDATION_SEED
from model import GRID
from PIL import Image
from reader import box_tokens
from torch import Tensor

from carve_kernels import Preset, capture_attention, carve, load, zoom
from carve_kernels.frontends import recipes
from carve_kernels.models.scenes import GENERAL, LEVELS, SIZE, Scene, Split, draw_scene

CHUNK, HEADS, SURE, WINDOW = 50, 3, 0.9, SIZE // 4
KEPT = Preset.paper(steps="t_start", keep=0.15, top=1, size=(192, 192), lam=0.1)


class Asked(NamedTuple):
    """A scene, its answer and the confidence in it, the maps [L, A, N] of the question and of the general prompt."""

    scene: Scene
    answer: str
    confidence: float
    task: Tensor
    general: Tensor


class Model:
    """The embedded model in float32, asked in batches."""

    def __init__(self) -> None:
        model, self.processor = load("small")
        self.model: Any = model.float()

    def answers(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Iterator[tuple[str, float, Tensor]]:
        """The first word of each answer, the mean probability of it and of the end, and the maps of each head."""
        for at in range(0, len(images), CHUNK):
            heads, part = recipes.HeadMaps(), slice(at, at + CHUNK)
            turns = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                for text in texts[part]
            ]
            prompts = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            inputs = self.processor(images=list(images[part]), text=prompts, return_tensors="pt")
            with capture_attention(self.model, layers="all", heads="each", on_layer=heads):
                output = self.model.generate(
                    **inputs, max_new_tokens=2, output_scores=True, return_dict_in_generate=True
                )
            words = output.sequences[:, inputs["input_ids"].shape[1] :]
            scores = torch.stack(output.scores, 1)
            for row, ids in enumerate(words):
                word = self.processor.decode(ids[:1]).strip()
                yield word, recipes.confidence(scores[row], ids), heads.maps(row)

    def ask(self, level: int, count: int, split: Split, seed: int) -> list[Asked]:
        """The scenes of a level with the answers to their questions, and the maps."""
        scenes = [draw_scene(seed + index, level, split=split) for index in range(count)]
        images = [scene.image for scene in scenes]
        answers = self.answers(images, [scene.question for scene in scenes])
        general = self.answers(images, [GENERAL] * count)
        return [Asked(scene, *one, other[2]) for scene, one, other in zip(scenes, answers, general, strict=True)]


def refined(asked: Asked, task: Tensor, general: Tensor, preset: Preset = KEPT) -> Image.Image:
    """The refined image by maps [L, N], which may be of layers or of heads."""
    return carve(asked.scene.image, task[:, None], general[:, None], grid=(GRID, GRID), preset=preset).refined


def by_layer(asked: Asked, layer: int, preset: Preset = KEPT) -> Image.Image:
    """By the head means of one layer."""
    task, general = (maps[layer].mean(0)[None] for maps in (asked.task, asked.general))
    return refined(asked, task, general, preset)


def by_change(asked: Asked) -> Image.Image:
    """By what the question changed in the layer that reacts most to it."""
    changed = recipes.query_layer(asked.task, asked.general).map[None]
    return refined(asked, changed, torch.ones_like(changed))


def by_heads(heads: list[recipes.Head]) -> Callable[[Asked], Image.Image]:
    """By the mean of the maps of some heads."""

    def refine(asked: Asked) -> Image.Image:
        raw = torch.stack([asked.task[head] for head in heads]).mean(0, keepdim=True)
        return refined(asked, raw, torch.ones_like(raw))

    return refine


def peaks(asked: Asked, count: int) -> list[Image.Image]:
    """The parts around the peaks of the first layer's map."""
    saliency = asked.task[0].mean(0).view(GRID, GRID)
    boxes = recipes.peak_boxes(saliency, (SIZE, SIZE), WINDOW, count=count)
    return [zoom(asked.scene.image, None, box, size=KEPT.size) for box in boxes or [(0, 0, SIZE, SIZE)]]


def measure(model: Model, level: int, scenes: int, validation: int) -> dict[str, float]:
    """Accuracy in percent by recipe, and the share of the answers that were not sure."""
    known = model.ask(level, validation, "train", VALIDATION_SEED)
    chosen = {
        "concentrated heads": recipes.frequent_heads(
            [recipes.concentrated_heads(each.task, (GRID, GRID)) for each in known], count=HEADS
        ),
        "grounding heads": recipes.grounding_heads(
            [each.task for each in known], [box_tokens(each.scene.box) for each in known], count=HEADS
        ),
    }
    sample = model.ask(level, scenes, "test", 0)
    last = sample[0].task.shape[0] - 1

    def right(refine: Callable[[Asked], Image.Image]) -> np.ndarray:
        answers = model.answers([refine(each) for each in sample], [each.scene.question for each in sample])
        return np.array([word == each.scene.answer for (word, *_), each in zip(answers, sample, strict=True)])

    def right_of_peaks(count: int) -> np.ndarray:
        """The answer of each scene is the most confident one about its parts."""
        parts = [(number, part) for number, each in enumerate(sample) for part in peaks(each, count)]
        texts = [sample[number].scene.question for number, _ in parts]
        best = [("", -1.0)] * len(sample)
        for (number, _), (word, sure, _) in zip(parts, model.answers([part for _, part in parts], texts), strict=True):
            best[number] = max(best[number], (word, sure), key=lambda answer: answer[1])
        return np.array([word == each.scene.answer for (word, _), each in zip(best, sample, strict=True)])

    plain = np.array([each.answer == each.scene.answer for each in sample])
    sure = np.array([each.confidence >= SURE for each in sample])
    profile = right(lambda each: by_layer(each, 0))
    paper = Preset.paper(steps="t_start")
    found = {
        "plain": plain,
        "paper, at t_start": right(lambda each: by_layer(each, last, paper)),
        "profile": profile,
        "last layer": right(lambda each: by_layer(each, last)),
        "query_layer": right(by_change),
        **{name: right(by_heads(heads)) for name, heads in chosen.items()},
        "profile, if unsure": np.where(sure, plain, profile),
        "(answers that were unsure)": ~sure,
        "one peak": right_of_peaks(1),
        "two peaks, the surer answer": right_of_peaks(2),
    }
    print(f"level {level}: " + ", ".join(f"{name} {heads}" for name, heads in chosen.items()), flush=True)
    return {name: 100 * float(values.mean()) for name, values in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300, help="test scenes a level")
    parser.add_argument("--validation", type=int, default=60, help="scenes a level on which heads are chosen")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, choices=LEVELS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model()
    columns = [measure(model, level, options.scenes, options.validation) for level in options.levels]
    print("| % right | " + " | ".join(f"level {level}" for level in options.levels) + " |")
    print("| --- " * (1 + len(columns)) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.1f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
