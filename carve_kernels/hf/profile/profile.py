"""Which rows and layers of a model react to the question: measured on the user's questions, written as a carve.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from carve_kernels import checks, deprecation
from carve_kernels.atomic_write import refuse_foreign, write_whole
from carve_kernels.backends import BACKENDS
from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS, build_prompt, open_image, prepare
from carve_kernels.hf.layouts import check_processor
from carve_kernels.hf.layouts.letterbox import Letterbox
from carve_kernels.hf.loading import resolve_preset
from carve_kernels.hf.model import check_decoder, check_steady, unwrap
from carve_kernels.hf.profile.candidate_maps import CandidateMaps, CandidateReader
from carve_kernels.hf.profile.scores import SCORE, Cell, Choice, Tally, tokens_of
from carve_kernels.hf.session import contract
from carve_kernels.ops.contrast import contrast
from carve_kernels.pipeline import pair
from carve_kernels.presets import STEPS, Preset
from carve_kernels.types import Box, RowsSpec, View

OnProgress = Callable[[str, int, int], None]

_DOUBT = "reacts no more to the question than to its paraphrases; the choice is arbitrary"
# Before the question, so that rows counted from its end stay the same tokens.
PARAPHRASES = ("Look at the image. {}", "Please answer this: {}")


@dataclass(frozen=True)
class Probe:
    """One question about one image, paraphrases of it, and the boxes of its answer, which are reported only.

    `boxes` are (x0, y0, x1, y1) in pixels of the upright image. Without `paraphrases` two are made by a prefix.
    """

    image: str | os.PathLike[str] | Image.Image
    question: str
    paraphrases: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.image, (str, os.PathLike, Image.Image)):
            raise TypeError(f"image: expected a path or a PIL image, got {checks.describe(self.image)}")
        checks.text("question", self.question)
        texts, boxes = _list("paraphrases", self.paraphrases), _list("boxes", self.boxes)
        paraphrases = tuple(checks.text(f"paraphrases[{index}]", text) for index, text in enumerate(texts))
        object.__setattr__(self, "paraphrases", paraphrases)
        object.__setattr__(self, "boxes", tuple(_box(f"boxes[{index}]", box) for index, box in enumerate(boxes)))

    def all_paraphrases(self) -> tuple[str, ...]:
        return self.paraphrases or tuple(template.format(self.question) for template in PARAPHRASES)


class BadProbes(ValueError):
    """Questions that cannot be used: `faults` has the index and the error of each."""

    def __init__(self, faults: Sequence[tuple[int, Exception]]) -> None:
        super().__init__("; ".join(f"probes[{index}]: {error}" for index, error in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Profile:
    """The result of `profile`: the preset with the chosen rows and layer, and every cell, best first.

    `doubt` says why the choice is arbitrary, or is None.
    """

    preset: Preset
    cells: tuple[Cell, ...]
    images: int
    questions: int
    boxes: int
    doubt: str | None = None

    pictures = deprecation.renamed_attribute("pictures", "images")

    @property
    def pick(self) -> Cell:
        return self.cells[0]

    @property
    def best_pointing(self) -> Cell | None:
        """The cell with the best pointing score; None without boxes."""
        known = [cell for cell in self.cells if cell.pointing is not None]
        return max(known, key=lambda cell: (cell.pointing, cell.mass), default=None)

    def to_dict(self, **facts: Any) -> dict[str, Any]:
        """A carve.json: the preset, and under "evidence" the measurements behind the choice and `facts`."""
        best = self.best_pointing
        evidence = {
            "score": SCORE,
            "images": self.images,
            "questions": self.questions,
            "boxes": self.boxes,
            "doubt": self.doubt,
            "preset": self.preset.to_dict(),
            "pick": self.pick.to_dict(),
            "best_pointing": None if best is None else best.to_dict(),
            **facts,
            "cells": [cell.to_dict() for cell in self.cells],
        }
        return {**self.preset.to_dict(), "evidence": deprecation.with_old_keys(evidence, pictures="images")}

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Write the carve.json, whole or not at all, in place of one that was saved there before.

        Raises ValueError if the path is any other file, or one that was changed since.
        """
        target = checks.path("path", path)
        refuse_foreign("path", target, is_saved)
        write_whole(target, (json.dumps(self.to_dict(**facts), indent=2, allow_nan=False) + "\n").encode())


def profile(
    model: Any,
    processor: Any,
    probes: Sequence[Probe],
    *,
    preset: str | Preset | Mapping[str, Any] | None = None,
    rows: Sequence[RowsSpec] | None = None,
    steps: Sequence[str] = STEPS,
    backend: str = "auto",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    fit: str | None = None,
    on_progress: OnProgress | None = None,
) -> Profile:
    """Choose the layer, the rows and the steps whose maps react to the question, without using a box.

    Each image is read once; the general instruction, the questions and their paraphrases decode in one batch, with all
    layers and all rows captured in the same forwards. The score of a cell is that of `scores.Cell`.

    ================  =================================================================================================
    argument          meaning
    ================  =================================================================================================
    probes            the questions; several questions about one image are more informative than one each about several
    preset            the preset to start from: a name, a Preset or a dict; None takes the carve.json of the model's
                      directory, or "paper". Only its layers, rows and steps are replaced
    rows              the candidates, as `capture_attention` takes them; None tries "last", "question" and each of the
                      last tokens of the user's text
    steps             of t_start, t_end and t_full; the later ones exist for "last" only. t_start alone costs one token
    backend           the backend that captures
    max_image_pixels  the largest number of pixels of an image
    fit               how images are shown, as for CarveEngine: None or "pad"
    ================  =================================================================================================

    `on_progress(stage, done, total)` is called before each image, and once more at the end.

    Raises TypeError or ValueError, before the model runs, for arguments that do not fit, and BadProbes, a ValueError,
    for images that cannot be read or that the processor refuses and texts that contain the image token; later for rows
    that a prompt does not have, or if no choice has maps for all questions.
    Source: ours; the entropy profile is that of CARVE, arXiv 2509.06461.
    """
    contract.ensure()
    check_decoder(model)
    check_steady(model)
    base = resolve_preset(unwrap(model), preset, None)
    check_processor(model, processor)
    steps = [checks.choice(f"steps[{index}]", step, STEPS) for index, step in enumerate(_list("steps", steps))]
    if not steps:
        raise ValueError("steps: expected at least one of them, got none")
    limit = checks.integer("max_image_pixels", max_image_pixels, low=1)
    checks.function("on_progress", on_progress)
    if rows is not None:
        _list("rows", rows)
    by_image = _by_image(probes)
    checks.choice("backend", backend, ("auto", *BACKENDS))
    letterbox = Letterbox.of(fit, model, processor, limit)
    _check(probes, processor, base, limit, letterbox)
    reader = CandidateReader(model, processor, base, rows, steps, backend, letterbox)
    tally = Tally(reader.layers)
    report, boxes = on_progress or (lambda stage, done, total: None), 0
    for done, group in enumerate(by_image):
        report("image", done, len(by_image))
        image = open_image(group[0].image, limit)
        paraphrases = [text for probe in group for text in probe.all_paraphrases()]
        texts = [*(probe.question for probe in group), *paraphrases]
        maps = reader.read(image, base.general_prompt, texts)
        general = next(maps)
        tasks = [_ChoiceMaps(next(maps), general, reader.choices, base, boxed=bool(probe.boxes)) for probe in group]
        for task, probe in zip(tasks, group, strict=True):
            others = [other.task for other, its in zip(tasks, group, strict=True) if its.question != probe.question]
            paraphrased = [
                _ChoiceMaps(next(maps), general, reader.choices, base, boxed=False).task
                for _ in probe.all_paraphrases()
            ]
            inside = tokens_of(probe.boxes, general.views)
            # A box that the processor has cropped away cannot be pointed at.
            boxes += bool(inside.any())
            for choice in task.task:
                if all(choice in other for other in (*others, *paraphrased)):
                    tally.add(
                        choice,
                        task.task[choice],
                        task.general[choice],
                        [other[choice] for other in others],
                        [other[choice] for other in paraphrased],
                    )
                    if inside.any():
                        tally.report(choice, task.task[choice], task.contrast[choice], inside)
    report("done", len(by_image), len(by_image))
    cells = tally.cells(sum(map(len, by_image)))
    if not cells:
        raise ValueError(f"rows: expected rows that every prompt has, none of {reader.rows} has maps for all questions")
    pick = cells[0]
    chosen = replace(
        base,
        layers=(pick.layer,),
        rows=pick.rows,  # type: ignore[arg-type]
        steps=pick.steps,
        step_weights=base.step_weights if pick.steps == "t_full" else None,
        layer_weights=None,
    )
    doubt = None if pick.score > 0 else _DOUBT
    return Profile(chosen, tuple(cells), len(by_image), len(probes), boxes, doubt)


def is_saved(path: Path) -> bool:
    """Whether a file is a carve.json as `Profile.save` wrote it: the preset is still the chosen one."""
    try:
        values = json.loads(path.read_bytes())
        return bool(values.pop("evidence")["preset"] == values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


class _ChoiceMaps:
    """For each choice the map of a text, the general map and, with boxes, their contrast, each [L, N]."""

    def __init__(
        self, maps: CandidateMaps, general: CandidateMaps, choices: Sequence[Choice], preset: Preset, boxed: bool
    ) -> None:
        self.task: dict[Choice, torch.Tensor] = {}
        self.general: dict[Choice, torch.Tensor] = {}
        self.contrast: dict[Choice, torch.Tensor] = {}
        for choice in choices:
            if choice.rows not in maps.maps or choice.rows not in general.maps:
                continue
            weights = preset.step_weights if choice.steps == "t_full" else None
            task, other, by_step = pair(
                maps.maps[choice.rows], general.maps[choice.rows], choice.steps, step_weights=weights
            )
            self.task[choice] = (task * by_step[:, None]).sum(1)
            self.general[choice] = (other * by_step[:, None]).sum(1)
            if boxed:
                self.contrast[choice] = _contrast(task, other, by_step, maps.views, preset)


def _contrast(
    task: torch.Tensor, general: torch.Tensor, by_step: torch.Tensor, views: Sequence[View], preset: Preset
) -> torch.Tensor:
    """The contrast of each layer by itself, on the tokens: [L, T, N] -> [L, N]."""
    grids = [view.grid for view in views]
    contrasts = []
    for task_layer, general_layer in zip(task.nan_to_num(), general.nan_to_num(), strict=True):
        fused = contrast(task_layer[None], general_layer[None], grids, grids, lam=preset.lam, step_weights=by_step)
        contrasts.append(torch.cat([view.flatten() for view in fused]))
    return torch.stack(contrasts)


def _image_key(probe: Probe) -> Hashable:
    return id(probe.image) if isinstance(probe.image, Image.Image) else os.fspath(probe.image)


def _by_image(probes: Any) -> list[list[Probe]]:
    """The questions, grouped by image."""
    by_image: dict[Hashable, list[Probe]] = {}
    for index, probe in enumerate(_list("probes", probes)):
        if not isinstance(probe, Probe):
            raise TypeError(f"probes[{index}]: expected a Probe, got {checks.describe(probe)}")
        by_image.setdefault(_image_key(probe), []).append(probe)
    if not by_image:
        raise ValueError("probes: expected at least one question, got none")
    return list(by_image.values())


def _check(
    probes: Sequence[Probe], processor: Any, preset: Preset, max_image_pixels: int, letterbox: Letterbox | None
) -> None:
    """Run each image through the processor and each text through the chat template, to find errors early."""
    faults: list[tuple[int, Exception]] = []
    prepared: set[Hashable] = set()
    for index, probe in enumerate(probes):
        try:
            prompts = [
                build_prompt(processor, text + preset.suffix) for text in (probe.question, *probe.all_paraphrases())
            ]
            if _image_key(probe) not in prepared:
                image = open_image(probe.image, max_image_pixels)
                image = image if letterbox is None else letterbox.pad(image)
                prepare(processor, [image], prompts[0], None, preset.max_pixels)
                prepared.add(_image_key(probe))
        except (TypeError, ValueError) as error:
            faults.append((index, error))
    if faults:
        raise BadProbes(faults)


def _list(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list, got {checks.describe(value)}")
    return value


def _box(name: str, box: Any) -> Box:
    edges = [checks.number(f"{name}[{index}]", edge) for index, edge in enumerate(_list(name, box))]
    if len(edges) != 4 or edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise ValueError(f"{name}: expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {checks.describe(box)}")
    return edges[0], edges[1], edges[2], edges[3]
