"""What was seen, for people and for programs: the panel, the JSON, the files, the table on the terminal."""

from __future__ import annotations

import hashlib
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

from carve_kernels.cli.notes import percent
from carve_kernels.cli.ours import is_json, png_info, png_texts
from carve_kernels.cli.output import clock, note, number_of, one_line, versions
from carve_kernels.cli.tables import screen, table
from carve_kernels.hf.engine.result import CarveResult
from carve_kernels.maps import AttentionMaps, is_saved
from carve_kernels.visualize import Scale, Tile, kept, overlay, panel, saliency_image

RECORD = "result.json"
# In the order in which they appear: where the record is, everything is.
FILES = ("panel.png", "saliency.png", "saliency.npy", "image.png", "refined.png", "maps.safetensors", RECORD)

_KIND = "carve_kernels.result"
_VERDICTS = {None: "", True: ", right", False: ", wrong"}
_STYLES = {None: "", True: "green", False: "red"}


@dataclass(frozen=True)
class Question:
    """What is asked about which image, and, where they are known, the right answer and more facts for the record."""

    image: Image.Image
    text: str
    truth: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """What the engine saw and answered under each preset, what to know of it, and what it was asked with."""

    asked: Question
    model: Mapping[str, Any]
    by_preset: Mapping[str, CarveResult]
    notes: Mapping[str, Sequence[str]]
    seconds: Mapping[str, float]


def write(folder: Path, seen: Look) -> None:
    """Write every file of FILES: the panel and the JSON hold all presets, the other files belong to the first."""
    first = next(iter(seen.by_preset.values()))
    rows = [_row(name, result, seen) for name, result in seen.by_preset.items()]
    _panel(rows, seen).save(folder / "panel.png", pnginfo=png_info())
    numpy.save(folder / "saliency.npy", first.saliency.cpu().numpy().astype(numpy.float32))
    # An array has no room for a mark of its own.
    beside = png_info(**{"saliency.npy": _digest(folder / "saliency.npy")})
    saliency_image(first.saliency).save(folder / "saliency.png", pnginfo=beside)
    write_record(folder, record(seen))
    first.image.save(folder / "image.png", pnginfo=png_info())
    first.refined.save(folder / "refined.png", pnginfo=png_info())
    first.task.save(folder / "maps.safetensors")


def write_record(folder: Path, values: Mapping[str, Any]) -> None:
    """Write result.json alone."""
    text = json.dumps({"format": f"{_KIND}/1", **values}, indent=2, allow_nan=False)
    (folder / RECORD).write_text(f"{text}\n", encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Whether a file with one of the names of FILES is as `write` wrote it."""
    if path.suffix == ".png":
        return png_texts(path) is not None
    if path.suffix == ".npy":
        texts = png_texts(path.with_suffix(".png"))
        return texts is not None and texts.get(path.name) == _digest(path)
    return is_saved(path) if path.suffix == ".safetensors" else is_json(_KIND)(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(seen: Look) -> dict[str, Any]:
    """Every number of a look, ready for JSON."""
    asked = seen.asked
    first = next(iter(seen.by_preset.values()))
    return {
        "question": asked.text,
        "truth": asked.truth,
        "image": {"width": asked.image.width, "height": asked.image.height},
        **asked.facts,
        "complexity": first.complexity,
        "model": dict(seen.model),
        "presets": {
            name: {**_numbers(result, asked.truth), "notes": list(seen.notes[name])}
            for name, result in seen.by_preset.items()
        },
        "seconds": dict(seen.seconds),
        "versions": versions(),
    }


def summarise(seen: Look, folder: Path, seconds: Mapping[str, float]) -> None:
    """Print the answers under each preset, where time went, where the files are, and what to know of the answers."""
    lines = [
        (
            name,
            _answer(result.answer, seen.asked.truth),
            _answer(result.refined_answer, seen.asked.truth),
            result.reason or f"{percent(_share(result))} of the image",
            f"{_average(result.entropy):.2f}",
            f"{sum(result.seconds.values()):.1f}",
        )
        for name, result in seen.by_preset.items()
    ]
    columns = ("", "plain answer", "refined answer", "kept", "entropy", "seconds")
    console = screen()
    console.print(table(Text(seen.asked.text), columns, lines))
    if seen.asked.truth is not None:
        console.print(Text(f"true answer: {seen.asked.truth}"))
    console.print(Text(_times(seconds)))
    console.print(Text(f"{folder}/: {', '.join(FILES)}"), soft_wrap=True)
    several = len(seen.by_preset) > 1
    for name, notes in seen.notes.items():
        for text in notes:
            note(f"{name}: {text}" if several else text)


def _times(seconds: Mapping[str, float]) -> str:
    """The time of each part, and of the whole command."""
    parts = {"libraries": "imports", "model": "load", "answers": "look", "files": "write"}
    told = ", ".join(f"{part} {seconds[key]:.1f} s" for part, key in parts.items())
    return f"{told}; all {clock.seconds():.1f} s"


def is_right(answer: str, truth: str | None) -> bool | None:
    """Whether an answer is the true one, None where nobody knows."""
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


def _panel(rows: list[list[Tile]], seen: Look) -> Image.Image:
    model = seen.model
    truth = "" if seen.asked.truth is None else f"; the true answer is {_quoted(seen.asked.truth)}"
    facts = (
        f"{model['type']}, {model['parameters'] / 1e6:.3g} M parameters, {model['dtype']} on {model['device']}, "
        f"attention {model['attention']}; image {seen.asked.image.width} x {seen.asked.image.height}; "
        f"loaded in {seen.seconds['load']:.1f} s, answered in {seen.seconds['look']:.1f} s"
    )
    return panel(rows, title=f"{_quoted(seen.asked.text)}{truth}", caption=facts)


def _row(name: str, result: CarveResult, seen: Look) -> list[Tile]:
    preset, layout, truth = result.preset, result.layout, seen.asked.truth
    task, general = (_grid(maps, preset.steps) for maps in (result.task, result.general))
    share = "of the attention per token"
    grey = f"\ngrey: {percent(result.unseen)} of the image, outside the model's view" if result.unseen > 0 else ""
    box, grid = layout.views[0][0].box, " x ".join(map(str, layout.views[0][0].grid))
    lam = "the mean of the general map" if preset.lam == "mean" else f"{preset.lam:g}"
    if result.reason is None:
        x0, y0, x1, y1 = result.box
        count = len(result.boxes)
        found = f"{number_of(count, 'region')}, {percent(_share(result))} of the image\nbox {x0}, {y0} to {x1}, {y1}"
    else:
        found = f"the whole image: {result.reason}"
    return [
        Tile(
            result.image,
            f"{name.capitalize()}\nPlain answer: {_verdict(result.answer, truth)}",
            "\n".join([_settings(result), *seen.notes[name]]),
        ),
        Tile(
            overlay(result.image, task, box=box),
            "Where it looks for the question",
            f"{grid} tokens, mean of heads and layers\nentropy {_average(result.entropy):.3f}, "
            f"mass {_average(_mass(result.task, preset.steps)):.3f}{grey}",
            _scale(100 * task, "%", share),
        ),
        Tile(
            overlay(result.image, general, box=box),
            "Where it looks in general",
            f"{_quoted(preset.general_prompt)}\nmass {_average(_mass(result.general, preset.steps)):.3f}{grey}",
            _scale(100 * general, "%", share),
        ),
        Tile(
            overlay(result.image, result.saliency),
            "Contrast",
            f"question / (general + lambda)\nlambda: {lam}",
            _scale(result.saliency, "", "contrast"),
        ),
        Tile(kept(result.image, result.regions), "Kept", found),
        Tile(
            result.refined,
            f"Refined answer: {_verdict(result.refined_answer, truth)}",
            f"refined image, {result.refined.width} x {result.refined.height}"
            + (", shown after the original" if preset.images == "original+refined" else ""),
        ),
    ]


def _scale(values: torch.Tensor, sign: str, unit: str) -> Scale:
    """The ends of a map with two digits, and a sign behind them."""
    low, high = (f"{end:.2g}{sign}" if end < 10 else f"{end:.0f}{sign}" for end in map(float, values.aminmax()))
    return Scale(low, high, unit)


def _read(values: torch.Tensor, maps: AttentionMaps, steps: str) -> torch.Tensor:
    """The mean over rows and over the steps that are read: [B, L, T, R, ...] -> [L, ...] of batch row 0."""
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
    kept = f"top {100 * preset.keep:g}% of the pixels"
    return f"{_span(result.task.layers)}; {_looking(preset.rows)}; {preset.steps}; {kept}"


def _looking(rows: str | int | tuple[Any, ...]) -> str:
    """Which tokens look."""
    if isinstance(rows, int):
        return f"last {number_of(rows, 'token')}"
    if isinstance(rows, tuple):
        return f"{rows[0]} {rows[1]!r}" if isinstance(rows[0], str) else f"tokens {', '.join(map(str, rows))}"
    return {"last": "last token", "question": "tokens of the question"}[rows]


def _span(layers: tuple[int, ...]) -> str:
    first, last = layers[0], layers[-1]
    if first == last:
        return f"layer {first}"
    run = layers == tuple(range(first, last + 1))
    return f"layers {first} to {last}" if run else f"layers {', '.join(map(str, layers))}"


def _verdict(answer: str, truth: str | None) -> str:
    return f"{_quoted(answer)}{_VERDICTS[is_right(answer, truth)]}"


def _answer(answer: str, truth: str | None) -> Text:
    # Plain quotes, which every terminal has.
    return Text(f'"{_short(answer)}"{_VERDICTS[is_right(answer, truth)]}', style=_STYLES[is_right(answer, truth)])


def _quoted(text: str) -> str:
    """A text for the panel, isolated: one that is read from right to left turns nothing around it."""
    return f"\u201c\u2068{_short(text)}\u2069\u201d"


def _short(text: str) -> str:
    return textwrap.shorten(one_line(text), 90, placeholder=" ...")
