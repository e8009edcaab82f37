"""carve-kernels profile: which rows and layers of a checkpoint see the question, written as a carve.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from carve_kernels.cli import options
from carve_kernels.cli.output import as_typed, number_of, results, stages, versions

if TYPE_CHECKING:
    from carve_kernels.cli.questions import Asked
    from carve_kernels.hf.profile.profile import Probe, Profile
    from carve_kernels.hf.profile.scores import Cell

_SHOWN = 8
_COLUMNS = ("layer", "rows", "steps", "score", "departure", "entropy", "between", "within")
_BY_BOXES = ("pointing", "by contrast", "mass")
# What a narrow screen does without, the first ones first.
_SPARE = ("mass", "within", "between", "departure", "entropy", "by contrast")


def profile(
    model: options.ModelOption,
    input: Annotated[
        str,
        options.path(
            # rich would take a list of names for its markup.
            'Lines of JSON: {"image": path, "question": text}; if you have them, "paraphrases": \\[text, ...] and '
            '"box": \\[x0, y0, x1, y1] in pixels. Boxes are reported and choose nothing.',
            "--input",
            "-i",
        ),
    ],
    output: Annotated[
        str, options.path("The carve.json: for --preset, or for the checkpoint's own folder.", "--output", "-o")
    ] = "out/carve.json",
    preset: options.PresetOption = None,
    rows: Annotated[
        list[str] | None,
        options.option(
            "Candidates, again and again: last, question, 4 (the last four), word:red, text:TEXT, -3 (the third last). "
            "Default: last, question, and each of the last words.",
            "--rows",
            "Method",
        ),
    ] = None,
    steps: Annotated[
        list[str] | None,
        options.option("Of t_start, t_end, t_full, again and again. Default: all.", "--steps", "Method"),
    ] = None,
    max_new_tokens: options.MaxNewTokensOption = None,
    fit: options.FitOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    attn: options.AttentionOption = None,
    backend: options.BackendOption = "auto",
    allow_pickle: options.AllowPickleOption = False,
    max_image_pixels: options.MaxImagePixelsOption = None,
) -> None:
    """Choose the layer and the rows of a checkpoint whose maps follow the question, on questions of your own.

    Each picture is looked at for the general instruction, every question and its other wordings, with all layers
    captured. What run, batch and CarveEngine need stands in the written file, and how it was chosen under "evidence".
    """
    from carve_kernels import checks
    from carve_kernels.cli.looking import facts_of, quiet
    from carve_kernels.cli.ours import refuse_inputs
    from carve_kernels.cli.questions import read, refuse
    from carve_kernels.hf import profile as profiling
    from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS
    from carve_kernels.presets import STEPS

    dtype = options.check_machine(dtype, backend)
    options.check_fit(fit)
    file, questions = checks.path("output", output), checks.path("input", input)
    limit = (
        MAX_IMAGE_PIXELS if max_image_pixels is None else checks.integer("max_image_pixels", max_image_pixels, low=1)
    )
    candidates = None if rows is None else [options.parse_rows(text) for text in rows]
    unchanged = dict.fromkeys(("layers", "rows", "steps", "keep", "top", "lam"))
    _, base = options.preset_of(model, preset, max_new_tokens=max_new_tokens, **unchanged)
    asked = read(questions)
    inputs = {"--input": [questions, *(line.picture for line in asked)], "--preset": options.preset_files(preset)}
    refuse_inputs([file], inputs)
    probes = _probes(questions, asked, limit)
    pictures = len({probe.image for probe in probes})
    with results(file.parent, [file.name], profiling.is_saved) as folder, quiet(), stages(2 + pictures) as announce:
        announce("loading the model")
        loaded, processor = options.load_model(model, dtype, options.device_of(device), attn, allow_pickle)
        try:
            found = profiling.profile(
                loaded,
                processor,
                probes,
                preset=base,
                rows=candidates,
                steps=steps or STEPS,
                backend=backend,
                max_image_pixels=limit,
                fit=fit,
                on_progress=lambda stage, done, total: announce(
                    "writing" if stage == "done" else f"picture {done + 1} of {total}"
                ),
            )
        except profiling.BadProbes as error:
            refuse(questions, [f"line {asked[place].line}: {as_typed(fault)}" for place, fault in error.faults])
            raise
        found.save(folder / file.name, model=facts_of(loaded), versions=versions())
    _summarise(found, file)


def _probes(path: Path, asked: Sequence[Asked], max_image_pixels: int) -> list[Probe]:
    """The questions with their wordings and boxes; ValueError names the bad lines by their numbers."""
    from carve_kernels.cli.questions import refuse
    from carve_kernels.hf.inputs import open_image

    probes: list[Probe] = []
    faults: list[str] = []
    opened: set[Path] = set()
    for line in asked:
        try:
            probes.append(_probe(line))
            if line.picture not in opened:
                open_image(line.picture, max_image_pixels)
                opened.add(line.picture)
        except (TypeError, ValueError, OSError) as error:
            faults.append(f"line {line.line}: {as_typed(error)}")
    refuse(path, faults)
    return probes


def _probe(line: Asked) -> Probe:
    from carve_kernels.hf.profile.profile import Probe

    extra: dict[str, Any] = {key: value for key, value in line.extra.items() if value is not None}
    if line.prompt is not None:
        raise ValueError("prompt: expected none, since other wordings of the question need the template's prompt")
    if "box" in extra and "boxes" in extra:
        raise ValueError("box: expected box or boxes, got both")
    boxes: Any = [extra["box"]] if "box" in extra else extra.get("boxes", [])
    return Probe(line.picture, line.text, extra.get("paraphrases", ()), boxes)


def _summarise(found: Profile, output: Path) -> None:
    """Print the best cells, the pick first, and the one that points best where boxes tell."""
    from rich.text import Text

    from carve_kernels.cli.tables import screen, show

    best = found.best_pointing
    shown = list(found.cells[:_SHOWN])
    if best is not None and best not in shown:
        shown.append(best)
    title = f"{number_of(found.questions, 'question')} about {number_of(found.images, 'image')}"
    columns = ["", *_COLUMNS, *(_BY_BOXES if best is not None else ())]
    lines = []
    for cell in shown:
        mark = "pick" if cell is found.pick else "points best" if cell is best else ""
        style = "bold" if cell is found.pick else ""
        lines.append([Text(text, style=style) for text in (mark, *_numbers(cell))])
    console = screen()
    show(console, title, columns, lines, [name for name in _SPARE if name in columns])
    if best is not None:
        console.print(Text(f"the boxes ({found.boxes}) chose nothing: the pick points at {_share(found.pick, best)}"))
    if found.doubt is not None:
        console.print(Text(found.doubt, style="yellow"))
    console.print(Text(str(output)), soft_wrap=True)


def _numbers(cell: Cell) -> list[str]:
    known = [cell.score, cell.departure, cell.entropy, cell.between, cell.within]
    known += [value for value in (cell.pointing, cell.contrast_pointing, cell.mass) if value is not None]
    return [str(cell.layer), _rows(cell.rows), cell.steps, *(f"{value:.3f}" for value in known)]


def _rows(rows: Any) -> str:
    """Rows as --rows takes them."""
    if not isinstance(rows, tuple):
        return str(rows)
    return ":".join(rows) if isinstance(rows[0], str) else ",".join(map(str, rows))


def _share(pick: Cell, best: Cell) -> str:
    return f"{pick.pointing:.1%}, the best cell at {best.pointing:.1%}"
