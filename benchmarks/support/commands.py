"""What the commands share: their options, the report that they fill, and the progress that they show."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks.support import lines, machine, plot, reports
from benchmarks.support.answers import WrongAnswer
from benchmarks.support.user_opponent import OpponentFailed

Quick = Annotated[bool, typer.Option(help="Small shapes and few rounds: a test of the benchmark, not a measurement.")]
Output = Annotated[Path | None, typer.Option(dir_okay=False, help="Write every number to this JSON file.")]
Markdown = Annotated[Path | None, typer.Option(dir_okay=False, help="Write the tables to this file.")]
Csv = Annotated[
    Path | None, typer.Option("--csv", dir_okay=False, help="Write the measured rows to this file, one a line.")
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", dir_okay=False, help="Plot the measured rows into this .png, .pdf or .svg; by matplotlib."),
]
Opponent = Annotated[
    str | None,
    typer.Option(metavar="package.module:function", help="Your own function, checked against ours and timed in turns."),
]
Layers = Annotated[int, typer.Option(min=1)]
Hidden = Annotated[int, typer.Option(min=128, help="A multiple of 128, the head size.")]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option()]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own choice by default.")]


def without_goals(entries: list[lines.Line]) -> list[lines.Line]:
    """Small shapes have no goals."""
    return [{**entry, "goals": []} for entry in entries]


@contextmanager
def reporting(
    name: str,
    output: Path | None,
    threads: int | None,
    tables: Callable[[Any], list[Table]],
    csv_file: Path | None = None,
    plot_file: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a report to fill, then prints and writes it; a wrong answer ends the command with an error."""
    check_output("--output", output)
    check_output("--csv", csv_file)
    check_output("--plot", plot_file)
    if plot_file is not None and (reason := plot.unusable(plot_file)) is not None:
        raise typer.BadParameter(f"--plot: {reason}")
    if threads is not None:
        torch.set_num_threads(threads)
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    report: dict[str, Any] = {"benchmark": name, "command": command, "machine": machine.describe()}
    try:
        yield report
    except OpponentFailed as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    except WrongAnswer as error:
        typer.echo(f"nothing was timed, since an answer is wrong: {error}", err=True)
        raise typer.Exit(1) from error
    screen = console()
    screen.print(report["command"])
    screen.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for table in tables(report["results"]):
        screen.print(table)
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")
    if csv_file is not None:
        reports.write_csv(report, csv_file)
    if plot_file is not None:
        plot.write(report, plot_file)


def console() -> Console:
    # A file or a pipe has no width, and the default of 80 would break every cell.
    return Console() if sys.stdout.isatty() else Console(width=200)


def check_output(option: str, path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{option}: {path.parent} is not a directory")


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=total)
        yield lambda done: bar.update(task, advance=1, description=done)


def refuse_given(context: typer.Context, names: Iterable[str]) -> None:
    """Refuse options of the random model that were given beside --model."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"--{name.replace('_', '-')}: is of the random model; leave out with --model")
