"""Which rows and layers of a model see the question: measured on the user's own questions, written as a carve.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from carve_kernels import checks
from carve_kernels.atomic_write import refuse_foreign, write_whole
from carve_kernels.backends import BACKENDS
from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS, build_prompt, open_image, prepare
from carve_kernels.hf.layouts import check_processor
from carve_kernels.hf.layouts.letterbox import Letterbox
from carve_kernels.hf.loading import preset_of
from carve_kernels.hf.model import unwrap
from carve_kernels.hf.profile.candidate_maps import RowReader, Seen
from carve_kernels.hf.profile.scores import SCORE, Cell, Choice, Tally, tokens_of
from carve_kernels.hf.query_rows import RowsSpec
from carve_kernels.ops.contrast import contrast
from carve_kernels.pipeline import pair
from carve_kernels.presets import STEPS, Preset
from carve_kernels.types import Box, View

OnProgress = Callable[[str, int, int], None]

_DOUBT = "no layer and row follows the question more than its wording: the pick is a guess"
# In front of the question, so that rows counted from its end stay the same words.
PARAPHRASES = ("Look at the image. {}", "Please answer this: {}")


@dataclass(frozen=True)
class Probe:
    """One question about one picture, other wordings of it, and, only to be reported, where its answer is.

    `boxes` are (x0, y0, x1, y1) in pixels of the upright picture. Without `paraphrases` two are made, by words in front
    of the question.
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
        given = tuple(checks.text(f"paraphrases[{place}]", text) for place, text in enumerate(texts))
        object.__setattr__(self, "paraphrases", given)
        object.__setattr__(self, "boxes", tuple(_box(f"boxes[{place}]", box) for place, box in enumerate(boxes)))

    def wordings(self) -> tuple[str, ...]:
        return self.paraphrases or tuple(template.format(self.question) for template in PARAPHRASES)


class BadProbes(ValueError):
    """Questions that cannot be asked: `faults` has the place of each and what is wrong with it."""

    def __init__(self, faults: Sequence[tuple[int, Exception]]) -> None:
        super().__init__("; ".join(f"probes[{place}]: {error}" for place, error in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Profile:
    """What `profile` found: the preset with the chosen rows and layer, and every cell, the best first.

    `doubt` says why the pick is a guess, or is None.
    """

    preset: Preset
    cells: tuple[Cell, ...]
    pictures: int
    questions: int
    boxes: int
    doubt: str | None = None

    @property
    def pick(self) -> Cell:
        return self.cells[0]

    @property
    def best_pointing(self) -> Cell | None:
        """The cell that points best, which only boxes can tell; None without boxes."""
        known = [cell for cell in self.cells if cell.pointing is not None]
        return max(known, key=lambda cell: (cell.pointing, cell.mass), default=None)

    def to_dict(self, **facts: Any) -> dict[str, Any]:
        """A carve.json: the preset, and under "evidence" what it was chosen by, with `facts` beside it."""
        best = self.best_pointing
        evidence = {
            "score": SCORE,
            "pictures": self.pictures,
            "questions": self.questions,
            "boxes": self.boxes,
            "doubt": self.doubt,
            "preset": self.preset.to_dict(),
            "pick": self.pick.to_dict(),
            "best_pointing": None if best is None else best.to_dict(),
            **facts,
            "cells": [cell.to_dict() for cell in self.cells],
        }
        return {**self.preset.to_dict(), "evidence": evidence}

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Write the carve.json, whole or not at all, in place of one that was saved there before.

        Raises ValueError if any other file stands there, or one that was changed since.
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
    """Choose the layer, the rows and the steps whose maps follow the question, without looking at a box.

    Each picture is read once; the general instruction, its questions and their wordings are answered together behind
    it, all layers and all rows captured in the same forwards. The score of a cell is that of `evidence.Cell`.

    ================  =================================================================================================
    argument          meaning
    ================  =================================================================================================
    probes            the questions; several questions on one picture tell more than one each on several
    preset            what the profile starts from: a name, a Preset or a dict; None takes the carve.json of the model's
                      directory, and "paper" without. Everything but layers, rows and steps is kept
    rows              the candidates, as `capture_attention` takes them; None tries "last", "question" and each of the
                      last words of the user's text
    steps             of t_start, t_end and t_full; the later ones exist for "last" alone. t_start alone costs one token
    backend           the room that captures
    max_image_pixels  the most pixels that an image may have
    fit               how images are shown, as for CarveEngine: None or "pad"
    ================  =================================================================================================

    `on_progress(stage, done, total)` is called before each picture, and once more at the end.

    Raises TypeError or ValueError, before the model runs, for arguments that do not fit, and BadProbes, a ValueError,
    for pictures that cannot be read or that the processor refuses and texts that hold the image token; later for rows
    that a prompt does not have, or where no choice has maps for all questions.
    Source: ours; the entropy profile is that of CARVE, arXiv 2509.06461.
    """
    base = preset_of(unwrap(model), preset, None)
    check_processor(model, processor)
    wanted = [checks.choice(f"steps[{place}]", step, STEPS) for place, step in enumerate(_list("steps", steps))]
    limit = checks.integer("max_image_pixels", max_image_pixels, low=1)
    pictures = _pictures(probes)
    checks.choice("backend", backend, ("auto", *BACKENDS))
    letterbox = Letterbox.of(fit, model, processor, limit)
    _check(probes, processor, base, limit, letterbox)
    reader = RowReader(model, processor, base, rows, wanted, backend, letterbox)
    tally = Tally(reader.layers)
    report, boxes = on_progress or (lambda stage, done, total: None), 0
    for done, asked in enumerate(pictures):
        report("picture", done, len(pictures))
        image = open_image(asked[0].image, limit)
        texts = [probe.question for probe in asked] + [text for probe in asked for text in probe.wordings()]
        seen = reader.looks(image, base.general_prompt, texts)
        general = next(seen)
        tasks = [_Maps(next(seen), general, reader.choices, base, boxed=bool(probe.boxes)) for probe in asked]
        for task, probe in zip(tasks, asked, strict=True):
            others = [other.task for other, its in zip(tasks, asked, strict=True) if its.question != probe.question]
            worded = [_Maps(next(seen), general, reader.choices, base, boxed=False).task for _ in probe.wordings()]
            inside = tokens_of(probe.boxes, general.views)
            # A box that the processor has cut away cannot be pointed at.
            boxes += bool(inside.any())
            for choice in task.task:
                if all(choice in other for other in (*others, *worded)):
                    tally.add(
                        choice,
                        task.task[choice],
                        task.general[choice],
                        [other[choice] for other in others],
                        [other[choice] for other in worded],
                    )
                    if inside.any():
                        tally.report(choice, task.task[choice], task.contrast[choice], inside)
    report("done", len(pictures), len(pictures))
    cells = tally.cells(sum(map(len, pictures)))
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
    return Profile(chosen, tuple(cells), len(pictures), len(probes), boxes, doubt)


def is_saved(path: Path) -> bool:
    """Whether a file is a carve.json as `Profile.save` wrote it: the preset is still what was chosen."""
    try:
        values = json.loads(path.read_bytes())
        return bool(values.pop("evidence")["preset"] == values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


class _Maps:
    """What is kept of one look beside the general one: by choice, its own and the general map, each [L, N]."""

    def __init__(self, seen: Seen, general: Seen, choices: Sequence[Choice], preset: Preset, boxed: bool) -> None:
        self.task: dict[Choice, torch.Tensor] = {}
        self.general: dict[Choice, torch.Tensor] = {}
        self.contrast: dict[Choice, torch.Tensor] = {}
        for choice in choices:
            if choice.rows not in seen.maps or choice.rows not in general.maps:
                continue
            weights = preset.step_weights if choice.steps == "t_full" else None
            task, other, by_step = pair(
                seen.maps[choice.rows], general.maps[choice.rows], choice.steps, step_weights=weights
            )
            self.task[choice] = (task * by_step[:, None]).sum(1)
            self.general[choice] = (other * by_step[:, None]).sum(1)
            if boxed:
                self.contrast[choice] = _contrast(task, other, by_step, seen.views, preset)


def _contrast(
    task: torch.Tensor, general: torch.Tensor, by_step: torch.Tensor, views: Sequence[View], preset: Preset
) -> torch.Tensor:
    """The contrast of each layer alone, on the tokens: [L, T, N] -> [L, N]."""
    grids = [view.grid for view in views]
    found = []
    for own, other in zip(task.nan_to_num(), general.nan_to_num(), strict=True):
        fused = contrast(own[None], other[None], grids, grids, lam=preset.lam, step_weights=by_step)
        found.append(torch.cat([part.flatten() for part in fused]))
    return torch.stack(found)


def _picture(probe: Probe) -> Hashable:
    return id(probe.image) if isinstance(probe.image, Image.Image) else os.fspath(probe.image)


def _pictures(probes: Any) -> list[list[Probe]]:
    """The questions by picture."""
    by_picture: dict[Hashable, list[Probe]] = {}
    for place, probe in enumerate(_list("probes", probes)):
        if not isinstance(probe, Probe):
            raise TypeError(f"probes[{place}]: expected a Probe, got {checks.describe(probe)}")
        by_picture.setdefault(_picture(probe), []).append(probe)
    if not by_picture:
        raise ValueError("probes: expected at least one question, got none")
    return list(by_picture.values())


def _check(
    probes: Sequence[Probe], processor: Any, preset: Preset, max_image_pixels: int, letterbox: Letterbox | None
) -> None:
    """Each picture goes through the processor once, each text through the template, to see that they can."""
    faults: list[tuple[int, Exception]] = []
    prepared: set[Hashable] = set()
    for place, probe in enumerate(probes):
        try:
            prompts = [build_prompt(processor, text + preset.suffix) for text in (probe.question, *probe.wordings())]
            if _picture(probe) not in prepared:
                image = open_image(probe.image, max_image_pixels)
                image = image if letterbox is None else letterbox.laid(image)
                prepare(processor, [image], prompts[0], None, preset.max_pixels)
                prepared.add(_picture(probe))
        except (TypeError, ValueError) as error:
            faults.append((place, error))
    if faults:
        raise BadProbes(faults)


def _list(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list, got {checks.describe(value)}")
    return value


def _box(name: str, box: Any) -> Box:
    edges = [checks.number(f"{name}[{place}]", edge) for place, edge in enumerate(_list(name, box))]
    if len(edges) != 4 or edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise ValueError(f"{name}: expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {checks.describe(box)}")
    return edges[0], edges[1], edges[2], edges[3]
