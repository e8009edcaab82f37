"""`python -m benchmarks capture | cpu | session | engine`: answers checked, opponents timed in turns, tables, JSON.

`python -m benchmarks roofline` predicts for GPUs and times nothing.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import bench_capture, bench_cpu, bench_engine, bench_session, cases, lines, machine
from benchmarks import roofline as rooflines
from benchmarks.answers import WrongAnswer
from benchmarks.models import Shape
from carve_kernels.models import small
from carve_kernels.selfcheck.roofline import GPUS

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)

Quick = Annotated[bool, typer.Option(help="Small shapes and few rounds: shows that it works, measures nothing.")]
Output = Annotated[Path | None, typer.Option(dir_okay=False, help="Write every number there as JSON.")]
Markdown = Annotated[Path | None, typer.Option(dir_okay=False, help="Write the tables there.")]
Layers = Annotated[int, typer.Option(min=1)]
Hidden = Annotated[int, typer.Option(min=128, help="A multiple of 128, the head size.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own choice by default.")]


@app.command()
def capture(
    quick: Quick = False,
    full: Annotated[bool, typer.Option(help="Go up to 32768 keys.")] = False,
    geometry: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(cases.GEOMETRIES)}; all.")] = None,
    rounds: Annotated[int, typer.Option(min=3)] = 31,
    budget: Annotated[float, typer.Option(help="Seconds for one case, warm or cold; at least 3 rounds.")] = 6.0,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """One call of capture beside eager attention, today's idiom, the best of plain torch and a read of the keys."""
    chosen = list(cases.standard(_geometries(geometry), cases.FULL_LENGTHS if full else cases.LENGTHS))
    if quick:
        chosen, rounds = cases.QUICK, 3
    with _reporting("capture", output, threads, bench_capture.tables) as report, _progress(len(chosen)) as advance:
        report["settings"] = {"rounds": rounds, "budget": budget}
        report["results"] = bench_capture.measure(chosen, rounds=rounds, budget=budget, advance=advance)


@app.command()
def cpu(
    quick: Quick = False,
    cells: Annotated[Literal["all", "headline"], typer.Option(help="headline: what the goals name.")] = "all",
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Threads, again and again; 1 and 2.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of a cell, warm or cold; 0.6, headline 1.0.")] = None,
    output: Output = None,
    markdown: Markdown = None,
) -> None:
    """The CPU room against its goals: capture, contrast, regions, a model with a session, the price of a call."""
    _check_output("--markdown", markdown)
    counts, lengths = threads or [1, 2], [128] if quick else [2048, 8192]
    chosen = bench_cpu.cases_of(cells, quick)
    seconds = bench_cpu.budget_of(cells, quick) if budget is None else budget
    total = bench_cpu.total(chosen, counts, lengths)
    with _reporting("cpu", output, max(counts), lines.tables) as report, _progress(total) as advance:
        report["settings"] = {"cells": cells, "threads": counts, "budget": seconds}
        report["results"] = bench_cpu.measure(chosen, counts, lengths, quick=quick, budget=seconds, advance=advance)
    if markdown is not None:
        markdown.write_text(lines.markdown(report))


@app.command()
def session(
    quick: Quick = False,
    layers: Layers = 28,
    hidden: Hidden = 1024,
    dtype: Dtype = "bfloat16",
    length: Annotated[list[int] | None, typer.Option(min=64, help="Tokens of the prompt, for seconds; 2048.")] = None,
    memory: Annotated[list[int] | None, typer.Option(min=64, help="The same, for memory; 2048 and 8192.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2)] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Captured rows of the memory measurement.")] = 1,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """A session in a whole random model of Qwen2.5-VL's shape: seconds and peak memory."""
    shape, lengths, peaks = Shape(layers, hidden, dtype), length or [2048], memory or [2048, 8192]
    if quick:
        shape, lengths, peaks, new_tokens, rounds = Shape(2, 256, dtype), [128], [128], 2, 3
    total = 2 * len(lengths) + len(peaks)
    with _reporting("session", output, threads, bench_session.tables) as report, _progress(total) as advance:
        report["settings"] = {**shape._asdict(), "rounds": rounds, "captured_layers": bench_session.LAYERS}
        report["results"] = {
            "price": bench_session.price(shape, lengths, new_tokens, rounds=rounds, advance=advance),
            "memory": bench_session.memory(shape, peaks, rows=rows, advance=advance),
        }


@app.command()
def roofline(
    geometry: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(cases.GEOMETRIES)}; all.")] = None,
    length: Annotated[list[int] | None, typer.Option(min=64, help="Keys, again and again; 512 to 32768.")] = None,
    output: Output = None,
    markdown: Annotated[Path | None, typer.Option(dir_okay=False, help="Write a choice of the tables there.")] = None,
) -> None:
    """Predicted, not timed: what the GPU rooms move and compute, what that takes at least, and the bound."""
    _check_output("--markdown", markdown)
    chosen, lengths = _geometries(geometry), length or list(rooflines.LENGTHS)
    total = 1 + len(chosen) * len(lengths) * len(rooflines.ROWS)
    with _reporting("roofline", output, None, rooflines.tables) as report, _progress(total) as advance:
        report["gpus"] = {name: gpu._asdict() for name, gpu in GPUS.items()}
        report["results"] = rooflines.measure(chosen, lengths, advance)
    if markdown is not None:
        markdown.write_text(rooflines.markdown(report))


@app.command()
def engine(
    quick: Quick = False,
    layers: Layers = 28,
    hidden: Hidden = 1024,
    dtype: Dtype = "bfloat16",
    visual: Annotated[list[int] | None, typer.Option(min=16, help="Visual tokens, squares; 256, 1024, 2304.")] = None,
    new_tokens: Annotated[list[int] | None, typer.Option(min=2, help="Tokens of an answer; 8 and 32.")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="paper, release; both.")] = None,
    part: Annotated[Literal["all", "seconds", "memory"], typer.Option(help="What is measured.")] = "all",
    rounds: Annotated[int, typer.Option(min=3)] = 5,
    slow_rounds: Annotated[int, typer.Option(min=1, help="Rounds of what runs under eager.")] = 3,
    model: Annotated[Path | None, typer.Option(help="Checkpoint for the stages; the embedded model.")] = None,
    threads: Threads = None,
    output: Output = None,
    markdown: Markdown = None,
) -> None:
    """One look by the engine against three calls under eager, the release's procedure and two plain answers."""
    _check_output("--markdown", markdown)
    shape, sizes, counts = (
        Shape(layers, hidden, dtype, *bench_engine.TOWER),
        visual or bench_engine.VISUAL,
        new_tokens or bench_engine.NEW_TOKENS,
    )
    if quick:
        shape, sizes, counts, rounds, slow_rounds = Shape(2, 256, dtype), (16, 64), (2,), 3, 1
    for tokens in sizes:
        if math.isqrt(tokens) ** 2 != tokens:
            raise typer.BadParameter(f"--visual: expected squares, as 256 or 1024, got {tokens}")
    names = preset or bench_engine.PRESETS
    chosen = bench_engine.cases(shape, names, sizes, counts)
    weighed = bench_engine.cases(shape, names, sizes, counts[:1])
    if quick:
        weighed = weighed[:1]
    directory = model or (small() if bench_engine.has_small() else None)
    if part == "memory":
        chosen, directory = [], None
    elif part == "seconds":
        weighed = []
    total = len(chosen) + len(weighed) + (directory is not None)
    with _reporting("engine", output, threads, lines.tables) as report, _progress(total) as advance:
        report["settings"] = {**shape._asdict(), "rounds": rounds, "slow_rounds": slow_rounds}
        bench_engine.check(shape, names)
        found = bench_engine.measure(chosen, rounds=rounds, slow_rounds=slow_rounds, advance=advance)
        found += [bench_engine.stages(directory, rounds=rounds, advance=advance)] if directory else []
        found += bench_engine.memory(weighed, slow=not quick, advance=advance)
        # Small shapes have no goals.
        report["results"] = [{**entry, "goals": []} for entry in found] if quick else found
    if markdown is not None:
        markdown.write_text(lines.markdown(report))


@contextmanager
def _reporting(
    name: str, output: Path | None, threads: int | None, tables: Callable[[Any], list[Table]]
) -> Iterator[dict[str, Any]]:
    """Hands out a report to fill, prints it and writes it; a wrong answer ends the command with what is wrong."""
    _check_output("--output", output)
    if threads is not None:
        torch.set_num_threads(threads)
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    report: dict[str, Any] = {"benchmark": name, "command": command, "machine": machine.describe()}
    try:
        yield report
    except WrongAnswer as error:
        typer.echo(f"nothing is timed, since an answer is wrong: {error}", err=True)
        raise typer.Exit(1) from error
    # A file or a pipe has no width of its own, and the default of 80 would break every cell.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(report["command"])
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for table in tables(report["results"]):
        console.print(table)
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")


def _geometries(named: list[str] | None) -> list[str]:
    unknown = set(named or ()) - set(cases.GEOMETRIES)
    if unknown:
        raise typer.BadParameter(f"expected geometries of {list(cases.GEOMETRIES)}, got {sorted(unknown)}")
    return named or list(cases.GEOMETRIES)


def _check_output(option: str, path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{option}: {path.parent} is no directory")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=total)
        yield lambda done: progress.update(task, advance=1, description=done)


if __name__ == "__main__":
    app()
