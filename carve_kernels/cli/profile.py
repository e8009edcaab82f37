"""carve-kernels profile: which rows and layers of a checkpoint react to the question, written as a carve.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from carve_kernels.cli import options
from carve_kernels.cli.output import as_typed, check_folder, number_of, replace_files, say, stages, versions

if TYPE_CHECKING:
    from carve_kernels.cli.questions import QuestionLine
    from carve_kernels.hf.profile.profile import Probe, Profile
    from carve_kernels.hf.profile.scores import Cell

_MOST = 8
_COLUMNS = ("layer", "rows", "steps", "score", "departure", "entropy", "between", "within")
_BY_BOXES = ("pointing", "by contrast", "mass")
# Columns that a narrow screen drops, the first ones first.
_SPARE = ("mass", "within", "between", "departure", "entropy", "by contrast")


@options.spread
def profile(
    model: options.ModelOption,
    input: Annotated[
        str,
        options.path(
            # rich would take a list of names for its markup.
            'Lines of JSON: {"image": path, "question": text}; optional: "paraphrases": \\[text, ...] and '
            '"box": \\[x0, y0, x1, y1] in pixels. Boxes are only reported; they do not affect the choice.',
            "--input",
            "-i",
        ),
    ],
    output: Annotated[
        str, options.path("The carve.json: for --preset, or for the folder of the checkpoint.", "--output", "-o")
    ] = "out/carve.json",
    rows: Annotated[
        list[str] | None,
        options.option(
            "Candidates: last, question, 4 (the last four), word:red, text:TEXT, -3 (the third last); may be repeated. "
            "Default: last, question, and each of the last words."
        ),
    ] = None,
    steps: Annotated[
        list[str] | None,
        options.option("t_start, t_end or t_full; may be repeated. Default: all."),
    ] = None,
    *,
    settings: options.Settings,
) -> None:
    """Choose the layer and the rows of a checkpoint whose maps react most to the question, on your questions.

    For each image, all layers are captured for the general prompt, each question and its paraphrases. The written file
    holds what run, batch and CarveEngine need, and under "evidence" how it was chosen.
    """
    from carve_kernels import checks
    from carve_kernels.cli.ask import model_facts, quiet
    from carve_kernels.cli.ours import refuse_inputs
    from carve_kernels.cli.questions import read, refuse
    from carve_kernels.hf import profile as profiling
    from carve_kernels.presets import STEPS

    file, questions = checks.path("output", output), checks.path("input", input)
    check_folder(file.parent)
    candidates = None if rows is None else [options.parse_rows(text) for text in rows]
    _, base = settings.preset_of(model)
    lines = read(questions)
    inputs = {"--input": [questions, *(line.image for line in lines)], "--preset": settings.preset_files}
    refuse_inputs([file], inputs)
    probes = _probes(questions, lines, settings.pixel_limit)
    total = 2 + len({probe.image for probe in probes})
    with replace_files(file.parent, [file.name], profiling.is_saved) as folder, quiet(), stages(total) as announce:
        announce("loading the model")
        loaded, processor = settings.load(model)
        try:
            chosen = profiling.profile(
                loaded,
                processor,
                probes,
                preset=base,
                rows=candidates,
                steps=steps or STEPS,
                **settings.engine,
                on_progress=lambda stage, done, total: announce(
                    "writing" if stage == "done" else f"image {done + 1} of {total}"
                ),
            )
        except profiling.BadProbes as error:
            refuse(questions, [f"line {lines[index].line}: {as_typed(fault)}" for index, fault in error.faults])
            raise
        chosen.save(folder / file.name, model=model_facts(loaded), versions=versions())
    _summarise(chosen, file)


def _probes(path: Path, lines: Sequence[QuestionLine], max_image_pixels: int) -> list[Probe]:
    """The questions with their paraphrases and boxes; ValueError names the bad lines by their numbers."""
    from carve_kernels.cli.questions import refuse
    from carve_kernels.hf.inputs import open_image

    probes: list[Probe] = []
    faults: list[str] = []
    opened: set[Path] = set()
    for line in lines:
        try:
            probes.append(_probe(line))
            if line.image not in opened:
                open_image(line.image, max_image_pixels)
                opened.add(line.image)
        except (TypeError, ValueError, OSError) as error:
            faults.append(f"line {line.line}: {as_typed(error)}")
    refuse(path, faults)
    return probes


def _probe(line: QuestionLine) -> Probe:
    from carve_kernels.hf.profile.profile import Probe

    extra: dict[str, Any] = {key: value for key, value in line.extra.items() if value is not None}
    if line.is_video or line.others:
        got = "a video" if line.is_video else f"a list of {len(line.paths)}"
        raise ValueError(f"image: expected one path, a string, in a profile, got {got}")
    if line.prompt is not None:
        raise ValueError("prompt: expected none, since paraphrases of the question need the prompt of the template")
    if "box" in extra and "boxes" in extra:
        raise ValueError("box: expected box or boxes, got both")
    boxes: Any = [extra["box"]] if "box" in extra else extra.get("boxes", [])
    return Probe(line.image, line.text, extra.get("paraphrases", ()), boxes)


def _summarise(chosen: Profile, output: Path) -> None:
    """Print the best cells, the pick first, and with boxes the cell that points best."""
    from rich.text import Text

    from carve_kernels.cli.tables import screen, show

    best = chosen.best_pointing
    cells = list(chosen.cells[:_MOST])
    if best is not None and best not in cells:
        cells.append(best)
    title = f"{number_of(chosen.questions, 'question')} about {number_of(chosen.images, 'image')}"
    columns = ["", *_COLUMNS, *(_BY_BOXES if best is not None else ())]
    lines = []
    for cell in cells:
        mark = "pick" if cell is chosen.pick else "points best" if cell is best else ""
        style = "bold" if cell is chosen.pick else ""
        lines.append([Text(text, style=style) for text in (mark, *_numbers(cell))])
    console = screen()
    show(console, title, columns, lines, [name for name in _SPARE if name in columns])
    if best is not None:
        pointing = f"the pick points at {chosen.pick.pointing:.1%}, the best cell at {best.pointing:.1%}"
        console.print(Text(f"the boxes ({chosen.boxes}) did not affect the choice: {pointing}"))
    if chosen.doubt is not None:
        console.print(Text(chosen.doubt, style="yellow"))
    say(str(output))


def _numbers(cell: Cell) -> list[str]:
    values = [cell.score, cell.departure, cell.entropy, cell.between, cell.within]
    values += [value for value in (cell.pointing, cell.contrast_pointing, cell.mass) if value is not None]
    return [str(cell.layer), _rows(cell.rows), cell.steps, *(f"{value:.3f}" for value in values)]


def _rows(rows: Any) -> str:
    """Rows in the form of --rows."""
    if not isinstance(rows, tuple):
        return str(rows)
    return ":".join(rows) if isinstance(rows[0], str) else ",".join(map(str, rows))
