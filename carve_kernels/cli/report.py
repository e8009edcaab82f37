"""The results of one question, for people and for programs: panel, record, files, table on the terminal."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from rich.text import Text

from carve_kernels.cli.digests import file_digest
from carve_kernels.cli.notes import percent
from carve_kernels.cli.ours import is_json, png_info, png_texts
from carve_kernels.cli.output import clock, note, number_of, one_line, versions
from carve_kernels.cli.tables import screen, table
from carve_kernels.hf.engine.result import CarveResult
from carve_kernels.maps import AttentionMaps, is_saved
from carve_kernels.visualize import Scale, Tile, kept, overlay, panel, saliency_image

RECORD = "result.json"
# In the order in which they are written: where the record is, all of them are.
FILES = ("panel.png", "saliency.png", "saliency.npy", "image.png", "refined.png", "maps.safetensors", RECORD)

_KIND = "carve_kernels.result"
_VERDICTS = {None: "", True: ", right", False: ", wrong"}
_STYLES = {None: "", True: "green", False: "red"}


@dataclass(frozen=True)
class Question:
    """A question about an image, the true answer if it is known, and more facts for the record."""

    image: Image.Image
    text: str
    truth: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A question with its results and notes by preset, the facts of the model, and the seconds of each part."""

    question: Question
    model: Mapping[str, Any]
    results: Mapping[str, CarveResult]
    notes: Mapping[str, Sequence[str]]
    seconds: Mapping[str, float]


def write(folder: Path, report: Report) -> None:
    """Write every file of FILES: panel and record show all presets, the other files the first one."""
    first = next(iter(report.results.values()))
    rows = [_row(name, result, report) for name, result in report.results.items()]
    _panel(rows, report).save(folder / "panel.png", pnginfo=png_info())
    numpy.save(folder / "saliency.npy", first.saliency.cpu().numpy().astype(numpy.float32))
    # An array cannot hold a mark, so the image beside it identifies it.
    mark = png_info(**{"saliency.npy": file_digest(folder / "saliency.npy") or ""})
    saliency_image(first.saliency).save(folder / "saliency.png", pnginfo=mark)
    write_record(folder, record(report))
    first.image.save(folder / "image.png", pnginfo=png_info())
    first.refined.save(folder / "refined.png", pnginfo=png_info())
    first.task.save(folder / "maps.safetensors")


def write_record(folder: Path, values: Mapping[str, Any]) -> None:
    """Write result.json."""
    text = json.dumps({"format": f"{_KIND}/1", **values}, indent=2, allow_nan=False)
    (folder / RECORD).write_text(f"{text}\n", encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Whether a file with one of the names of FILES is as `write` wrote it."""
    if path.suffix == ".png":
        return png_texts(path) is not None
    if path.suffix == ".npy":
        texts = png_texts(path.with_suffix(".png"))
        return texts is not None and texts.get(path.name) == file_digest(path)
    return is_saved(path) if path.suffix == ".safetensors" else is_json(_KIND)(path)


def record(report: Report) -> dict[str, Any]:
    """Every number of a report, ready for JSON."""
    question = report.question
    first = next(iter(report.results.values()))
    return {
        "question": question.text,
        "truth": question.truth,
        "image": {"width": question.image.width, "height": question.image.height},
        **question.facts,
        "complexity": first.complexity,
        "model": dict(report.model),
        "presets": {
            name: {**_numbers(result, question.truth), "notes": list(report.notes[name])}
            for name, result in report.results.items()
        },
        "seconds": dict(report.seconds),
        "versions": versions(),
    }


def summarise(report: Report, folder: Path, seconds: Mapping[str, float]) -> None:
    """Print the answers under each preset, the seconds of each part, the files, and the notes."""
    truth = report.question.truth
    lines = [
        (
            name,
            _answer(result.answer, truth),
            _answer(result.refined_answer, truth),
            result.reason or f"{percent(_share(result))} of the image",
            f"{_average(result.entropy):.2f}",
            f"{sum(result.seconds.values()):.1f}",
        )
        for name, result in report.results.items()
    ]
    columns = ("", "plain answer", "refined answer", "selected", "entropy", "seconds")
    console = screen()
    console.print(table(Text(report.question.text), columns, lines))
    if truth is not None:
        console.print(Text(f"true answer: {truth}"))
    console.print(Text(_times(seconds)))
    console.print(Text(f"{folder}/: {', '.join(FILES)}"), soft_wrap=True)
    several = len(report.results) > 1
    for name, notes in report.notes.items():
        for text in notes:
            note(f"{name}: {text}" if several else text)


def _times(seconds: Mapping[str, float]) -> str:
    """The seconds of each part, and of the whole command."""
    keys = {"libraries": "imports", "model": "load", "answers": "look", "files": "write"}
    parts = ", ".join(f"{name} {seconds[key]:.1f} s" for name, key in keys.items())
    return f"{parts}; all {clock.seconds():.1f} s"


def is_right(answer: str, truth: str | None) -> bool | None:
    """Whether an answer is the true one; None where that is not known."""
    return None if truth is None else answer.strip().casefold() == truth.strip().casefold()


def _numbers(result: CarveResult, truth: str | None) -> dict[str, Any]:
    regions, layout = result.regions, result.layout
    return {
        "answer": result.answer,
        "right": is_right(result.answer, truth),
        "refined_answer": result.refined_answer,
        "refined_right": is_right(result.refined_answer, truth),
        "answer_ids": list(result.answer_ids),
        "refined_ids": list(result.refined_ids),
        "prompt": result.prompt,
        "preset": result.preset.to_dict(),
        "layers": list(result.task.layers),
        "views": [{"grid": list(view.grid), "box": list(view.box), "kind": view.kind} for view in layout.views[0]],
        "steps": {"task": len(result.task.steps), "general": len(result.general.steps)},
        "dtype": result.task.dtype,
        "entropy": {str(layer): value for layer, value in result.entropy.items()},
        "mass": {
            "task": _mass(result.task, result.preset.steps),
            "general": _mass(result.general, result.preset.steps),
        },
        "boxes": regions.boxes.tolist(),
        "scores": regions.scores.tolist(),
        "box": list(regions.box),
        "kept": _share(result),
        "unseen": result.unseen,
        "reason": result.reason,
        "saliency": {"low": float(result.saliency.min()), "high": float(result.saliency.max())},
        "refined": {"width": result.refined.width, "height": result.refined.height},
        "seconds": result.seconds,
    }


def _panel(rows: list[list[Tile]], report: Report) -> Image.Image:
    model, question = report.model, report.question
    truth = "" if question.truth is None else f"; the true answer is {_quoted(question.truth)}"
    facts = (
        f"{model['type']}, {model['parameters'] / 1e6:.3g} M parameters, {model['dtype']} on {model['device']}, "
        f"attention {model['attention']}; image {question.image.width} x {question.image.height}; "
        f"loaded in {report.seconds['load']:.1f} s, answered in {report.seconds['look']:.1f} s"
    )
    return panel(rows, title=f"{_quoted(question.text)}{truth}", caption=facts)


def _row(name: str, result: CarveResult, report: Report) -> list[Tile]:
    preset, layout, truth = result.preset, result.layout, report.question.truth
    task, general = (_grid(maps, preset.steps) for maps in (result.task, result.general))
    share = "of the attention per token"
    grey = f"\ngrey: {percent(result.unseen)} of the image, outside the model's view" if result.unseen > 0 else ""
    box, grid = layout.views[0][0].box, " x ".join(map(str, layout.views[0][0].grid))
    lam = "the mean of the general map" if preset.lam == "mean" else f"{preset.lam:g}"
    if result.reason is None:
        x0, y0, x1, y1 = result.box
        count = len(result.boxes)
        selected = f"{number_of(count, 'region')}, {percent(_share(result))} of the image\nbox {x0}, {y0} to {x1}, {y1}"
    else:
        selected = f"the whole image: {result.reason}"
    return [
        Tile(
            result.image,
            f"{name.capitalize()}\nPlain answer: {_verdict(result.answer, truth)}",
            "\n".join([_settings(result), *report.notes[name]]),
        ),
        Tile(
            overlay(result.image, task, box=box),
            "Attention for the question",
            f"{grid} tokens, mean of heads and layers\nentropy {_average(result.entropy):.3f}, "
            f"mass {_average(_mass(result.task, preset.steps)):.3f}{grey}",
            _scale(100 * task, "%", share),
        ),
        Tile(
            overlay(result.image, general, box=box),
            "Attention for the general prompt",
            f"{_quoted(preset.general_prompt)}\nmass {_average(_mass(result.general, preset.steps)):.3f}{grey}",
            _scale(100 * general, "%", share),
        ),
        Tile(
            overlay(result.image, result.saliency),
            "Contrast",
            f"question / (general + lambda)\nlambda: {lam}",
            _scale(result.saliency, "", "contrast"),
        ),
        Tile(kept(result.image, result.regions), "Selected", selected),
        Tile(
            result.refined,
            f"Refined answer: {_verdict(result.refined_answer, truth)}",
            f"refined image, {result.refined.width} x {result.refined.height}"
            + (", shown after the original" if preset.images == "original+refined" else ""),
        ),
    ]


def _scale(values: torch.Tensor, sign: str, unit: str) -> Scale:
    """The lowest and highest value of a map with two digits, each followed by a sign."""
    low, high = (f"{end:.2g}{sign}" if end < 10 else f"{end:.0f}{sign}" for end in map(float, values.aminmax()))
    return Scale(low, high, unit)


def _read(values: torch.Tensor, maps: AttentionMaps, steps: str) -> torch.Tensor:
    """The mean over the rows and the chosen steps: [B, L, T, R, ...] -> [L, ...] of batch row 0."""
    end = maps.last_step(0) + 1
    start, stop = {"t_start": (0, 1), "t_end": (end - 1, end), "t_full": (0, end)}[steps]
    valid = maps.valid[0, :, start:stop].flatten(1)
    chosen = values[0, :, start:stop].flatten(1, 2)
    return torch.stack([layer[mask].mean(0) for layer, mask in zip(chosen, valid, strict=True)]).cpu()


def _grid(maps: AttentionMaps, steps: str) -> torch.Tensor:
    """The first view's map, the mean over the layers, [GH, GW]."""
    return _read(maps.view()[None], maps, steps).mean(0)


def _mass(maps: AttentionMaps, steps: str) -> dict[str, float]:
    """The share of the attention that falls on the image, by layer."""
    mass = _read(maps.mass, maps, steps)
    return {str(layer): float(value) for layer, value in zip(maps.layers, mass, strict=True)}


def _average(by_layer: dict[Any, float]) -> float:
    return sum(by_layer.values()) / len(by_layer)


def _share(result: CarveResult) -> float:
    return float(result.mask.float().mean())


def _settings(result: CarveResult) -> str:
    preset = result.preset
    selected = f"top {100 * preset.keep:g}% of the pixels"
    return f"{_span(result.task.layers)}; {_rows(preset.rows)}; {preset.steps}; {selected}"


def _rows(rows: str | int | tuple[Any, ...]) -> str:
    """The query rows in words."""
    if isinstance(rows, int):
        return f"last {number_of(rows, 'token')}"
    if isinstance(rows, tuple):
        return f"{rows[0]} {rows[1]!r}" if isinstance(rows[0], str) else f"tokens {', '.join(map(str, rows))}"
    return {"last": "last token", "question": "tokens of the question"}[rows]


def _span(layers: tuple[int, ...]) -> str:
    first, last = layers[0], layers[-1]
    if first == last:
        return f"layer {first}"
    is_range = layers == tuple(range(first, last + 1))
    return f"layers {first} to {last}" if is_range else f"layers {', '.join(map(str, layers))}"


def _verdict(answer: str, truth: str | None) -> str:
    return f"{_quoted(answer)}{_VERDICTS[is_right(answer, truth)]}"


def _answer(answer: str, truth: str | None) -> Text:
    # Straight quotes, which every terminal has.
    return Text(f'"{_short(answer)}"{_VERDICTS[is_right(answer, truth)]}', style=_STYLES[is_right(answer, truth)])


def _quoted(text: str) -> str:
    """A text for the panel, isolated: right-to-left text does not reorder what is around it."""
    return f"\u201c\u2068{_short(text)}\u2069\u201d"


def _short(text: str) -> str:
    return textwrap.shorten(one_line(text), 90, placeholder=" ...")
