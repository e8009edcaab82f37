"""The results of one question, for people and for programs: panel, record, files, table on the terminal."""

from __future__ import annotations

import re
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
from carve_kernels.hf.engine.result import CarvedImage, CarveResult
from carve_kernels.hf.inputs import bare_prompts
from carve_kernels.maps import AttentionMaps, is_saved
from carve_kernels.models import small
from carve_kernels.types import Size
from carve_kernels.view_pixels import on_pixels
from carve_kernels.visualize import Scale, Tile, kept, overlay, panel, saliency_image

RECORD = "result.json"
# The files of one image.
_IMAGE_FILES = ("saliency.png", "saliency.npy", "image.png", "refined.png")
# In the order in which they are written: where the record is, all of them are.
FILES = ("panel.png", *_IMAGE_FILES, "maps.safetensors", RECORD)

_NUMBERED = re.compile(rf"({'|'.join(name.split('.')[0] for name in _IMAGE_FILES)})-\d+\.(png|npy)")
_KIND = "carve_kernels.result"
_VERDICTS = {None: "", True: ", right", False: ", wrong"}
_STYLES = {None: "", True: "green", False: "red"}


@dataclass(frozen=True)
class Question:
    """A question about images, the true answer if it is known, and more facts for the record."""

    images: Sequence[Image.Image]
    text: str
    truth: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        return len(self.images) > 1


@dataclass(frozen=True)
class Report:
    """A question with its results and notes by preset, the facts of the model, and the seconds of each part."""

    question: Question
    model: Mapping[str, Any]
    results: Mapping[str, CarveResult]
    notes: Mapping[str, Sequence[str]]
    seconds: Mapping[str, float]


def files_of(images: int) -> tuple[str, ...]:
    """The files of a question about so many images: those of several images are numbered, image-0.png and so on."""
    if images == 1:
        return FILES
    own = (_numbered(name, number) for number in range(images) for name in _IMAGE_FILES)
    return ("panel.png", *own, "maps.safetensors", RECORD)


def stale_in(folder: Path, names: Sequence[str]) -> list[str]:
    """The files in a folder that a question about fewer or more images left there, and `names` do not replace."""
    found = [path.name for path in folder.glob("*-*.*") if _NUMBERED.fullmatch(path.name)] if folder.is_dir() else []
    # An array after the image that identifies it.
    found.sort(key=lambda name: (name.split(".")[0], not name.endswith(".png")))
    return [name for name in (*FILES, *found) if name not in names]


def write(folder: Path, report: Report) -> None:
    """Write every file of `files_of`: panel and record show all presets, the other files the first one."""
    first = next(iter(report.results.values()))
    several = report.question.several
    rows = [
        _row(name, result, report, number)
        for name, result in report.results.items()
        for number in range(len(report.question.images))
    ]
    _panel(rows, report).save(folder / "panel.png", pnginfo=png_info())
    for number, image in enumerate(first.images):
        saliency, array, original, refined = (
            folder / (_numbered(name, number) if several else name) for name in _IMAGE_FILES
        )
        numpy.save(array, image.saliency.cpu().numpy().astype(numpy.float32))
        # An array cannot hold a mark, so the image beside it identifies it.
        mark = png_info(**{array.name: file_digest(array) or ""})
        saliency_image(image.saliency, seen=image.seen).save(saliency, pnginfo=mark)
        image.image.save(original, pnginfo=png_info())
        image.refined.save(refined, pnginfo=png_info())
    write_record(folder, record(report))
    first.task.save(folder / "maps.safetensors")


def write_record(folder: Path, values: Mapping[str, Any]) -> None:
    """Write result.json."""
    write_json(folder / RECORD, _KIND, values)


def is_ours(path: Path) -> bool:
    """Whether a file with one of the names of `files_of` is as `write` wrote it."""
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
        "image": _size(question.images[0]),
        **({"images": [_size(image) for image in question.images]} if question.several else {}),
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
            result.reason or _selected(result),
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
    say(f"{folder}/: {', '.join(files_of(len(report.question.images)))}")
    several = len(report.results) > 1
    for name, notes in report.notes.items():
        for text in notes:
            note(f"{name}: {text}" if several else text)


def _selected(result: CarveResult) -> str:
    """Which share of which image was selected."""
    if len(result.images) == 1:
        return f"{percent(_share(result))} of the image"
    refined = ((number, result.images[number]) for number in result.refined_images)
    return ", ".join(f"{percent(_share(image))} of image {number}" for number, image in refined)


def _numbered(name: str, number: int) -> str:
    """The name of a file of one of several images: image-1.png."""
    stem, suffix = name.split(".")
    return f"{stem}-{number}.{suffix}"


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
    if (warning := bare_prompts(processor)) is not None:
        notes.append(warning)
    return notes


def unseen_warning(share: float, measured: bool = False, image: int | None = None) -> str | None:
    """A warning of the share of an image that the model did not see; None where it is negligible.

    What a measured layout leaves out cannot be shown by a fit. `image` is the number of one of several.
    """
    if share <= 0.005:
        return None
    text = percent(share).replace("%", " %")
    fix = "" if measured else " (centre crop); --fit pad shows it whole"
    which = "the image" if image is None else f"image {image}"
    return f"{text} of {which} was outside the model's view{fix}"


def percent(share: float) -> str:
    """A share as text; one that is more than 0 and less than 1 is never rounded to either."""
    if 0 < share < 0.005:
        return "less than 1%"
    return f"{min(share, 0.99) if share < 1 else share:.0%}"


def is_right(answer: str, truth: str | None) -> bool | None:
    """Whether an answer is the true one; None where that is not known."""
    return None if truth is None else answer.strip().casefold() == truth.strip().casefold()


def _numbers(result: CarveResult, truth: str | None) -> dict[str, Any]:
    layout, first = result.layout, result.images[result.refined_images[0]]
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
        "views": [
            {"grid": list(view.grid), "box": list(view.box), "kind": view.kind}
            | ({"image": view.image} if len(result.images) > 1 else {})
            for view in layout.views[0]
        ],
        "measured": layout.measured,
        "steps": {"task": len(result.task.steps), "general": len(result.general.steps)},
        "dtype": result.task.dtype,
        "entropy": {str(layer): value for layer, value in result.entropy.items()},
        "mass": {
            name: _mass(getattr(result, name), result.preset.steps, result.entropy) for name in ("task", "general")
        },
        **_found(first),
        "reason": result.reason,
        **(_numbers_of_images(result) if len(result.images) > 1 else {}),
        "seconds": result.seconds,
    }


def _found(image: CarvedImage) -> dict[str, Any]:
    """What was found in one image."""
    regions, seen = image.regions, image.saliency[image.seen] if bool(image.seen.any()) else image.saliency
    return {
        "boxes": regions.boxes.tolist(),
        "scores": regions.scores.tolist(),
        "box": list(regions.box),
        "kept": _share(image),
        "unseen": image.unseen,
        "reason": image.reason,
        "saliency": {"low": float(seen.min()), "high": float(seen.max())},
        "refined": _size(image.refined),
    }


def _numbers_of_images(result: CarveResult) -> dict[str, Any]:
    """What was found in each of several images, and which of them were refined."""
    images = [{**_found(image), "strength": image.strength} for image in result.images]
    return {"images": images, "refined_images": list(result.refined_images)}


def _size(image: Image.Image) -> dict[str, int]:
    return {"width": image.width, "height": image.height}


def _panel(rows: list[list[Tile]], report: Report) -> Image.Image:
    model, question = report.model, report.question
    truth = "" if question.truth is None else f"; the true answer is {_quoted(question.truth)}"
    facts = (
        f"{model['type']}, {model['parameters'] / 1e6:.3g} M parameters, {model['dtype']} on {model['device']}, "
        f"attention {model['attention']}; {_images(question)}; "
        f"loaded in {report.seconds['load']:.1f} s, answered in {report.seconds['answer']:.1f} s"
    )
    return panel(rows, title=f"{_quoted(question.text)}{truth}", caption=facts)


def _images(question: Question) -> str:
    sizes = ", ".join(f"{image.width} x {image.height}" for image in question.images)
    return f"images {sizes}" if question.several else f"image {sizes}"


def _row(name: str, result: CarveResult, report: Report, number: int) -> list[Tile]:
    """The tiles of one image under one preset."""
    preset, image, truth = result.preset, result.images[number], report.question.truth
    lam = "the mean of the general map" if preset.lam == "mean" else f"{preset.lam:g}"
    unseen = f"\nhatched: {percent(image.unseen)} of the image, outside the model's view" if image.unseen > 0 else ""
    every = "of all images: " if len(result.images) > 1 else ""
    selected = f"the whole image: {image.reason}"
    if image.reason is None:
        x0, y0, x1, y1 = image.regions.box
        count = number_of(len(image.regions.boxes), "region")
        selected = f"{count}, {percent(_share(image))} of the image\nbox {x0}, {y0} to {x1}, {y1}"

    def attention(maps: AttentionMaps, title: str, facts: str) -> Tile:
        mass = _average(_mass(maps, preset.steps, result.entropy))
        grids, tokens, figure = _attention(maps, preset.steps, result.entropy, image, number)
        scale = _scale(100 * tokens, "%", "of the attention per token")
        shape = " and ".join(f"{rows} x {columns}" for rows, columns in dict.fromkeys(grids))
        shape = f"{len(grids)} views of {shape}" if len(grids) > 1 else shape
        return Tile(figure, title, f"{facts.format(grid=shape)}mass {mass:.3f}{unseen}", scale)

    seen = image.saliency[image.seen] if bool(image.seen.any()) else image.saliency
    return [
        _first_tile(name, result, report, number),
        attention(
            result.task,
            "Attention for the question",
            f"{{grid}} tokens, mean of heads and layers\n{every}entropy {_average(result.entropy):.3f}, ",
        ),
        attention(result.general, "Attention for the general prompt", f"{_quoted(preset.general_prompt)}\n{every}"),
        Tile(
            overlay(image.image, image.saliency, seen=image.seen),
            "Contrast",
            f"question / (general + lambda)\nlambda: {lam}{unseen}",
            _scale(seen, "", "contrast"),
        ),
        Tile(kept(image.image, image.regions, seen=image.seen), "Selected", f"{selected}{unseen}"),
        _last_tile(result, truth, number),
    ]


def _first_tile(name: str, result: CarveResult, report: Report, number: int) -> Tile:
    """The image; the first one of a preset with the plain answer."""
    title, notes = f"{name.capitalize()}\nPlain answer: {_verdict(result.answer, report.question.truth)}", []
    several = len(result.images) > 1
    if several:
        title = f"{title}\nImage 0" if number == 0 else f"Image {number}"
    if number == 0:
        notes = [_settings(result), *report.notes[name]]
    if several:
        notes.append(f"strength of its contrast {result.images[number].strength or 0.0:.3g}")
    return Tile(result.images[number].image, title, "\n".join(notes))


def _last_tile(result: CarveResult, truth: str | None, number: int) -> Tile:
    """The refined image, with the refined answer if the model was shown it."""
    image, order = result.images[number].refined, ""
    caption = f"refined image, {image.width} x {image.height}"
    if number not in result.refined_images:
        return Tile(image, "Not refined", f"{caption}, not shown to the model")
    if result.preset.images == "original+refined":
        order = ", shown after the original" if len(result.images) == 1 else ", shown after the originals"
    return Tile(image, f"Refined answer: {_verdict(result.refined_answer, truth)}", f"{caption}{order}")


def _attention(
    maps: AttentionMaps, steps: str, layers: Iterable[int], image: CarvedImage, number: int
) -> tuple[list[Size], torch.Tensor, Image.Image]:
    """The grids of an image's views, the mean map over these layers of all of their tokens, and it over the image."""
    layout = maps.layout
    if layout is None:
        raise ValueError("maps: expected a layout, got none")
    found = [index for index, view in enumerate(layout.views[0]) if view.image == number]
    views = [layout.views[0][index] for index in found]
    grids = [view.grid for view in views]
    tokens = [_read(maps.view(0, index)[None], maps, steps, layers).mean(0) for index in found]
    flat = torch.cat([view.flatten() for view in tokens])
    if len(views) == 1:
        return grids, flat, overlay(image.image, tokens[0], box=views[0].box, seen=image.seen)
    size = image.image.height, image.image.width
    pixels = on_pixels(tokens, [view.box for view in views], size)
    return grids, flat, overlay(image.image, pixels, seen=image.seen)


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


def _mass(maps: AttentionMaps, steps: str, layers: Iterable[int]) -> dict[str, float]:
    """The share of the attention that falls on the image, by layer."""
    mass = _read(maps.mass, maps, steps, layers).tolist()
    return dict(zip(map(str, layers), mass, strict=True))


def _average(by_layer: dict[Any, float]) -> float:
    return sum(by_layer.values()) / len(by_layer)


def _share(found: CarveResult | CarvedImage) -> float:
    return float(found.regions.mask.float().mean())


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
