"""`python -m benchmarks COMMAND`, as capture, session or engine (`--help` names all): check, then time.

`python -m benchmarks roofline` predicts times on GPUs and measures nothing; `python -m benchmarks compare A.json
B.json` compares two reports of `--output`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks import (
    bench_capture,
    bench_column_sums,
    bench_engine,
    bench_frontends,
    bench_gradients,
    bench_layouts,
    bench_pixels,
    bench_session,
)
from benchmarks import roofline as rooflines
from benchmarks.gpu import sections as gpu_sections
from benchmarks.support import cases, layout_cases, lines, reports, user_opponent
from benchmarks.support.commands import (
    Csv,
    Dtype,
    Hidden,
    Layers,
    Markdown,
    Opponent,
    Output,
    Plot,
    Quick,
    Threads,
    check_output,
    console,
    progress,
    refuse_given,
    reporting,
    without_goals,
)
from benchmarks.support.models import Shape
from carve_kernels.models import small
from carve_kernels.selfcheck.roofline import GPUS

# Options of `session` that a checkpoint has no use for.
_OF_RANDOM = ("layers", "hidden", "dtype", "length", "memory", "rows")

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def capture(
    quick: Quick = False,
    full: Annotated[bool, typer.Option(help="Go up to 32768 keys.")] = False,
    geometry: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(cases.GEOMETRIES)}; all by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3)] = 31,
    budget: Annotated[float, typer.Option(min=0, help="Seconds for one case, warm or cold; at least 3 rounds.")] = 6.0,
    threads: Threads = None,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
) -> None:
    """One call of capture against eager attention, the common idiom, the best of plain torch and a read of the keys."""
    chosen = list(cases.standard(_geometries(geometry), cases.FULL_LENGTHS if full else cases.LENGTHS))
    if quick:
        chosen, rounds = cases.QUICK, 3
    with (
        reporting("capture", output, threads, bench_capture.tables, csv_file, plot_file) as report,
        progress(len(chosen)) as advance,
    ):
        report["settings"] = {"rounds": rounds, "budget": budget}
        report["results"] = bench_capture.measure(chosen, rounds=rounds, budget=budget, advance=advance)


@app.command()
def cpu(
    quick: Quick = False,
    cells: Annotated[Literal["all", "headline"], typer.Option(help="headline: the cells with goals.")] = "all",
    part: Annotated[
        Literal["all", "capture"], typer.Option(help="capture: alone, and only against the fast opponents.")
    ] = "all",
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Threads, may be repeated; 1 and 2.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Seconds of a cell, warm or cold; 0.6, headline 1.0.")
    ] = None,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
    markdown: Markdown = None,
) -> None:
    """The CPU backend against its goals: capture, contrast, regions, a model with a session, the cost of a call."""
    check_output("--markdown", markdown)
    counts, lengths = threads or [1, 2], [128] if quick else [2048, 8192]
    chosen = bench_capture.HEADLINE if cells == "headline" else bench_capture.all_cases()
    # All cells take ten minutes.
    seconds = (1.0 if cells == "headline" else 0.6) if budget is None else budget
    side, shape, row_length = 1024, Shape(28, 1024, "bfloat16"), 2048
    if quick:
        chosen, seconds, side, shape, row_length = bench_capture.QUICK_GOALS, 0.0, 64, Shape(2, 256, "bfloat16"), 256
    total = len(chosen) * len(counts)
    if part == "all":
        total += bench_pixels.CELLS * len(counts) + len(lengths) + 3
    with (
        reporting("cpu", output, max(counts), lines.tables, csv_file, plot_file) as report,
        progress(total) as advance,
    ):
        report["settings"] = {"cells": cells, "threads": counts, "budget": seconds}
        slow = (bench_capture.EAGER, bench_capture.REPEAT) if part == "all" else ()
        entries = list(bench_capture.measure_goals(chosen, counts, budget=seconds, advance=advance, slow=slow))
        if part == "all":
            for count in counts:
                entries += bench_pixels.measure(side, count, budget=seconds, advance=advance)
            torch.set_num_threads(max(counts))
            entries += bench_session.decode(shape, lengths, rounds=3 if quick else 40, advance=advance)
            entries += bench_session.prefill(shape, lengths[0], rounds=2 if quick else 3, advance=advance)
            entries += bench_capture.one_row(row_length, budget=seconds, advance=advance)
            entries += bench_capture.overhead(budget=seconds, advance=advance)
        report["results"] = without_goals(entries) if quick else entries
    if markdown is not None:
        markdown.write_text(lines.markdown(report))


@app.command()
def session(
    context: typer.Context,
    quick: Quick = False,
    layers: Layers = 28,
    hidden: Hidden = 1024,
    dtype: Dtype = "bfloat16",
    length: Annotated[list[int] | None, typer.Option(min=64, help="Prompt tokens of the timings; 2048.")] = None,
    memory: Annotated[list[int] | None, typer.Option(min=64, help="The same for memory; 2048 and 8192.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2)] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Captured rows of the memory measurement.")] = 1,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    model: Annotated[
        Path | None, typer.Option(help="Your checkpoint instead of the random model, with one image; seconds only.")
    ] = None,
    opponent: Opponent = None,
    threads: Threads = None,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
) -> None:
    """A session in a random model with the shape of Qwen2.5-VL, or in your checkpoint: seconds and peak memory."""
    user = _user(opponent)
    shape, lengths, peaks = Shape(layers, hidden, dtype), length or [2048], memory or [2048, 8192]
    if quick:
        shape, lengths, peaks, new_tokens, rounds = Shape(2, 256, dtype), [128], [128], 2, 3
    if model is not None:
        refuse_given(context, _OF_RANDOM)
    total = 2 if model is not None else 2 * len(lengths) + len(peaks)
    with (
        reporting("session", output, threads, bench_session.tables, csv_file, plot_file) as report,
        progress(total) as advance,
    ):
        report["settings"] = {"rounds": rounds, "captured_layers": bench_session.LAYERS}
        report["settings"] |= {"opponent": opponent} if opponent else {}
        if model is not None:
            side = bench_session.QUICK_SIDE if quick else bench_session.SIDE
            report["settings"] |= {"model": model.resolve().name, "side": side}
            price = bench_session.price_of_checkpoint(
                _subject(model, side), new_tokens, rounds=rounds, advance=advance, user=user
            )
            report["results"] = {"price": price, "memory": []}
            return
        report["settings"] |= shape._asdict()
        report["results"] = {
            "price": bench_session.price(shape, lengths, new_tokens, rounds=rounds, advance=advance, user=user),
            "memory": bench_session.memory(shape, peaks, rows=rows, advance=advance),
        }


@app.command()
def layouts(
    quick: Quick = False,
    family: Annotated[list[str] | None, typer.Option(help="A processor of the tests, may be repeated; all.")] = None,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    threads: Threads = None,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
    markdown: Markdown = None,
) -> None:
    """`layout_of` beside the processor's own call, for one image of about 1,024 tokens; on one thread."""
    check_output("--markdown", markdown)
    names, size = family or list(bench_layouts.QUICK if quick else layout_cases.CASES), layout_cases.PHOTO
    if quick:
        size, rounds = bench_layouts.QUICK_PHOTO, 3
    unknown = sorted(set(names) - set(layout_cases.CASES))
    if unknown:
        raise typer.BadParameter(f"--family: expected some of {list(layout_cases.CASES)}, got {unknown}")
    with reporting("layouts", output, threads, lines.tables, csv_file, plot_file) as report, progress(1) as advance:
        report["settings"] = {"size": size, "rounds": rounds}
        entries = list(bench_layouts.measure(names, size, rounds=rounds, advance=advance))
        report["results"] = without_goals(entries) if quick else entries
    if markdown is not None:
        markdown.write_text(lines.markdown(report))


@app.command()
def gradients(
    quick: Quick = False,
    length: Annotated[list[int] | None, typer.Option(min=64, help="Keys, may be repeated; 2048 and 8192.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds of a case; at least 3 rounds.")] = 2.5,
    threads: Threads = None,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
    markdown: Markdown = None,
) -> None:
    """The backward of a capture of four rows on a CPU, against plain torch and autograd, and its peak memory."""
    check_output("--markdown", markdown)
    lengths, seconds = (bench_gradients.QUICK, 0.0) if quick else (length or bench_gradients.LENGTHS, budget)
    with (
        reporting("gradients", output, threads, lines.tables, csv_file, plot_file) as report,
        progress(3 * len(lengths)) as advance,
    ):
        report["settings"] = {"budget": seconds}
        entries = list(bench_gradients.measure(lengths, budget=seconds, advance=advance))
        report["results"] = without_goals(entries) if quick else entries
    if markdown is not None:
        markdown.write_text(lines.markdown(report))


@app.command()
def roofline(
    geometry: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(cases.GEOMETRIES)}; all by default.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option(min=64, help="Keys, may be repeated; 512 to 32768.")] = None,
    output: Output = None,
    markdown: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write some of the tables to this file.")
    ] = None,
) -> None:
    """Predicted, not timed: traffic and arithmetic of the GPU backends, the least time they take, and the bound."""
    check_output("--markdown", markdown)
    chosen, lengths = _geometries(geometry), length or list(rooflines.LENGTHS)
    total = 1 + len(chosen) * len(lengths) * len(rooflines.ROWS)
    with reporting("roofline", output, None, rooflines.tables) as report, progress(total) as advance:
        report["gpus"] = {name: gpu._asdict() for name, gpu in GPUS.items()}
        report["results"] = rooflines.measure(chosen, lengths, advance)
    if markdown is not None:
        markdown.write_text(rooflines.markdown(report))


@app.command()
def engine(
    context: typer.Context,
    quick: Quick = False,
    layers: Layers = 28,
    hidden: Hidden = 1024,
    dtype: Dtype = "bfloat16",
    visual: Annotated[list[int] | None, typer.Option(min=16, help="Visual tokens, squares; 256, 1024, 2304.")] = None,
    new_tokens: Annotated[list[int] | None, typer.Option(min=2, help="New tokens of an answer; 8 and 32.")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="paper, release; both.")] = None,
    part: Annotated[Literal["all", "seconds", "memory"], typer.Option(help="What to measure.")] = "all",
    rounds: Annotated[int, typer.Option(min=3)] = 5,
    slow_rounds: Annotated[int, typer.Option(min=1, help="Rounds of the opponents with eager.")] = 3,
    model: Annotated[
        Path | None, typer.Option(help="Your checkpoint instead of the random model, with one image.")
    ] = None,
    opponent: Opponent = None,
    threads: Threads = None,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
    markdown: Markdown = None,
) -> None:
    """An engine call against three calls with eager, the release's procedure and two plain answers."""
    check_output("--markdown", markdown)
    user = _user(opponent, "saliency")
    shape, sizes, counts = (
        Shape(layers, hidden, dtype, *bench_engine.TOWER),
        visual or bench_engine.VISUAL,
        new_tokens or bench_engine.NEW_TOKENS,
    )
    if quick:
        shape, sizes, counts, rounds, slow_rounds = Shape(2, 256, dtype), (16, 64), (2,), 3, 1
    for tokens in sizes:
        if math.isqrt(tokens) ** 2 != tokens:
            raise typer.BadParameter(f"--visual: expected square numbers such as 256, got {tokens}")
    names = preset or bench_engine.PRESETS
    directory = model or (small() if bench_engine.has_small() else None)
    chosen: list[Any] = []
    if model is not None:
        refuse_given(context, ("layers", "hidden", "dtype", "visual"))
        chosen = _checkpoint_cases(model, names, bench_session.QUICK_SIDE if quick else bench_session.SIDE, counts)
    else:
        chosen = list(bench_engine.cases(shape, names, sizes, counts))
    memory_cases = [case for case in chosen if case.new_tokens == counts[0]]
    if quick:
        memory_cases = memory_cases[:1]
    checked = chosen
    if part == "memory":
        chosen, directory = [], None
    elif part == "seconds":
        memory_cases = []
    total = len(chosen) + len(memory_cases) + (directory is not None)
    with (
        reporting("engine", output, threads, lines.tables, csv_file, plot_file) as report,
        progress(total) as advance,
    ):
        report["settings"] = {"rounds": rounds, "slow_rounds": slow_rounds}
        report["settings"] |= {"opponent": opponent} if opponent else {}
        if model is not None:
            report["settings"] |= {"model": model.resolve().name, "side": checked[0].side}
            bench_engine.check_checkpoint(checked, user)
        else:
            report["settings"] |= shape._asdict()
            bench_engine.check(shape, names, user)
        entries = bench_engine.measure(chosen, rounds=rounds, slow_rounds=slow_rounds, advance=advance, user=user)
        entries += [bench_engine.stages(directory, rounds=rounds, advance=advance)] if directory else []
        entries += bench_engine.memory(memory_cases, slow=not quick, advance=advance)
        report["results"] = without_goals(entries) if quick else entries
    if markdown is not None:
        markdown.write_text(lines.markdown(report))


app.command()(bench_frontends.frontends)
app.command("column_sums")(bench_column_sums.column_sums_command)


@app.command()
def gpu(
    quick: Quick = False,
    section: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(gpu_sections.SECTIONS)}; all by default.")
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds; a measurement that would take longer does not begin.")
    ] = 420,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
    markdown: Markdown = None,
) -> None:
    """The kernels on the first CUDA device against their opponents and predictions, written as it goes."""
    check_output("--markdown", markdown)
    unknown = set(section or ()) - set(gpu_sections.SECTIONS)
    if unknown:
        raise typer.BadParameter(f"--section: expected some of {list(gpu_sections.SECTIONS)}, got {sorted(unknown)}")
    device = gpu_sections.device()
    if device is None:
        typer.echo(f"torch {torch.__version__} sees no CUDA device: nothing was measured", err=True)
        raise typer.Exit(1)
    sizes = gpu_sections.QUICK if quick else gpu_sections.Sizes()
    with reporting("gpu", output, None, lines.tables, csv_file, plot_file) as report:

        def save() -> None:
            if output is not None:
                output.write_text(json.dumps(report, indent=1) + "\n")
            if markdown is not None:
                markdown.write_text(lines.markdown(report))

        gpu_sections.measure(
            report, device, sizes, sections=section or gpu_sections.SECTIONS, budget=budget, save=save,
            announce=lambda text: print(text, flush=True),
        )  # fmt: skip
        if quick:
            report["results"] = without_goals(report["results"])
    missed = [goal["goal"] for entry in report["results"] for goal in entry["goals"] if not goal["met"]]
    counts = {name: len(report[name]) for name in ("results", "left_out", "failed")} | {"goals missed": len(missed)}
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    if report["failed"]:
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A report of --output.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
) -> None:
    """B over A for the rows that both reports have; says what differs between them, and which rows only one has."""
    try:
        reported = reports.read(first), reports.read(second)
    except reports.NoReport as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    found = reports.rows(reported[0]), reports.rows(reported[1])
    screen = console()
    for name, path, report in zip("AB", (first, second), reported, strict=True):
        screen.print(f"{name}: {path}: {report.get('command', report['benchmark'])}", markup=False, highlight=False)
    for difference in reports.differences(*reported):
        typer.echo(f"warning: {difference}", err=True)
    for table in reports.comparison(*found):
        screen.print(table)
    for row in reports.missing(*found):
        typer.echo(row)
    if not found[0].keys() & found[1].keys():
        typer.echo("nothing was compared: the reports have no row in common", err=True)
        raise typer.Exit(1)


def _geometries(named: list[str] | None) -> list[str]:
    unknown = set(named or ()) - set(cases.GEOMETRIES)
    if unknown:
        raise typer.BadParameter(f"expected geometries of {list(cases.GEOMETRIES)}, got {sorted(unknown)}")
    return named or list(cases.GEOMETRIES)


def _subject(model: Path, side: int) -> bench_session.Subject:
    with _errors_of_model():
        return bench_session.of_checkpoint(model, side)


def _checkpoint_cases(model: Path, presets: Sequence[str], side: int, new_tokens: Sequence[int]) -> list[Any]:
    with _errors_of_model():
        return list(bench_engine.checkpoint_cases(model, presets, side, new_tokens))


@contextmanager
def _errors_of_model() -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(f"--model: {str(error).removeprefix('model: ')}") from error


def _user(opponent: str | None, second: str = "maps") -> user_opponent.UserOpponent | None:
    try:
        return None if opponent is None else user_opponent.find(opponent, second)
    except user_opponent.BadOpponent as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
