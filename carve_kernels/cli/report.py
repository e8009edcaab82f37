"""The results of one question, for people and for programs: panel, record, files, table on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from rich.text import Text

from carve_kernels import deprecation
from carve_kernels.cli.digests import file_digest
from carve_kernels.cli.ours import is_json, png_info, png_texts, write_json
from carve_kernels.cli.output import clock, note, number_of, one_line, say, versions
from carve_kernels.cli.tables import screen, table
from carve_kernels.hf.engine.result import CarveResult
from carve_kernels.maps import AttentionMaps, is_saved
from carve_kernels.models import small
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
    write_json(folder / RECORD, _KIND, values)


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
        "seconds": deprecation.with_old_keys(report.seconds, look="answer"),
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
    say(f"{folder}/: {', '.join(FILES)}")
    several = len(report.results) > 1
    for name, notes in report.notes.items():
        for text in notes:
            note(f"{name}: {text}" if several else text)


def _times(seconds: Mapping[str, float]) -> str:
    """The seconds of each part, and of the whole command."""
    keys = {"libraries": "imports", "model": "load", "answers": "answer", "files": "write"}
    parts = ", ".join(f"{name} {seconds[key]:.1f} s" for name, key in keys.items())
    return f"{parts}; all {clock.seconds():.1f} s"


def notes_of(result: CarveResult, model: Any, processor: Any) -> list[str]:
    """What the model could not read, or did not answer: a sentence each, without a full stop."""
    notes = []
    tokens = processor.tokenizer.tokenize(result.question)
    unknown = tokens.count(processor.tokenizer.unk_token) if tokens else 0
    if not tokens:
        notes.append("the model's tokenizer finds no tokens in the question")
    elif unknown:
        notes.append(f"the model's tokenizer does not know {unknown} of the {len(tokens)} tokens of the question")
    answers = {"plain": result.answer, "refined": result.refined_answer}
    silent = [which for which, answer in answers.items() if not answer.strip()]
    if silent:
        notes.append(f"the model returned no text in its {' and its '.join(silent)} answer")
    if notes and model.name_or_path == str(small()):
        notes.append("the embedded model, small, only knows questions such as 'what digit is red'")
    return notes


def unseen_warning(share: float) -> str | None:
    """A warning of the share of an image that the model did not see; None where it is negligible."""
    if share <= 0.005:
        return None
    text = percent(share).replace("%", " %")
    return f"{text} of the image was outside the model's view (centre crop); --fit pad shows it whole"


def percent(share: float) -> str:
    """A share as text; one that is more than 0 and less than 1 is never rounded to either."""
    if 0 < share < 0.005:
        return "less than 1%"
    return f"{min(share, 0.99) if share < 1 else share:.0%}"


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
        "layers_left_out": list(result.layers_left_out),
        "views": [{"grid": list(view.grid), "box": list(view.box), "kind": view.kind} for view in layout.views[0]],
        "steps": {"task": len(result.task.steps), "general": len(result.general.steps)},
        "dtype": result.task.dtype,
        "entropy": {str(layer): value for layer, value in result.entropy.items()},
        "mass": {
            name: _mass(getattr(result, name), result.preset.steps, result.entropy) for name in ("task", "general")
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
        f"loaded in {report.seconds['load']:.1f} s, answered in {report.seconds['answer']:.1f} s"
    )
    return panel(rows, title=f"{_quoted(question.text)}{truth}", caption=facts)


def _row(name: str, result: CarveResult, report: Report) -> list[Tile]:
    preset, regions, truth = result.preset, result.regions, report.question.truth
    view = result.layout.views[0][0]
    grid = " x ".join(map(str, view.grid))
    lam = "the mean of the general map" if preset.lam == "mean" else f"{preset.lam:g}"
    selected = f"the whole image: {result.reason}"
    if result.reason is None:
        x0, y0, x1, y1 = result.box
        count = number_of(len(result.boxes), "region")
        selected = f"{count}, {percent(_share(result))} of the image\nbox {x0}, {y0} to {x1}, {y1}"
    order = ", shown after the original" if preset.images == "original+refined" else ""

    def attention(maps: AttentionMaps, title: str, facts: str) -> Tile:
        tokens = _grid(maps, preset.steps, result.entropy)
        mass = _average(_mass(maps, preset.steps, result.entropy))
        grey = f"\ngrey: {percent(result.unseen)} of the image, outside the model's view" if result.unseen > 0 else ""
        scale = _scale(100 * tokens, "%", "of the attention per token")
        return Tile(overlay(result.image, tokens, box=view.box), title, f"{facts}mass {mass:.3f}{grey}", scale)

    return [
        Tile(
            result.image,
            f"{name.capitalize()}\nPlain answer: {_verdict(result.answer, truth)}",
            "\n".join([_settings(result), *report.notes[name]]),
        ),
        attention(
            result.task,
            "Attention for the question",
            f"{grid} tokens, mean of heads and layers\nentropy {_average(result.entropy):.3f}, ",
        ),
        attention(result.general, "Attention for the general prompt", f"{_quoted(preset.general_prompt)}\n"),
        Tile(
            overlay(result.image, result.saliency),
            "Contrast",
            f"question / (general + lambda)\nlambda: {lam}",
            _scale(result.saliency, "", "contrast"),
        ),
        Tile(kept(result.image, regions), "Selected", selected),
        Tile(
            result.refined,
            f"Refined answer: {_verdict(result.refined_answer, truth)}",
            f"refined image, {result.refined.width} x {result.refined.height}{order}",
        ),
    ]


def _scale(values: torch.Tensor, sign: str, unit: str) -> Scale:
    """The lowest and highest value of a map with two digits, each followed by a sign."""
    low, high = (f"{end:.2g}{sign}" if end < 10 else f"{end:.0f}{sign}" for end in map(float, values.aminmax()))
    return Scale(low, high, unit)


def _read(values: torch.Tensor, maps: AttentionMaps, steps: str, layers: Iterable[int]) -> torch.Tensor:
    """The mean over the rows and the chosen steps: [B, L, T, R, ...] -> [L, ...] of batch row 0, in these layers."""
    end = maps.last_step(0) + 1
    start, stop = {"t_start": (0, 1), "t_end": (end - 1, end), "t_full": (0, end)}[steps]
    valid = maps.valid[0, :, start:stop].flatten(1)
    chosen = values[0, :, start:stop].flatten(1, 2)
    means = (chosen[index][valid[index]].mean(0) for index in map(maps.layers.index, layers))
    return torch.stack(list(means)).cpu()


def _grid(maps: AttentionMaps, steps: str, layers: Iterable[int]) -> torch.Tensor:
    """The first view's map, the mean over these layers, [GH, GW]."""
    return _read(maps.view()[None], maps, steps, layers).mean(0)


def _mass(maps: AttentionMaps, steps: str, layers: Iterable[int]) -> dict[str, float]:
    """The share of the attention that falls on the image, by layer."""
    mass = _read(maps.mass, maps, steps, layers).tolist()
    return dict(zip(map(str, layers), mass, strict=True))


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
