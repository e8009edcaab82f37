"""carve-kernels check: every kernel of a device against the reference, and its time against the predicted one."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from carve_kernels.cli.options import device_of, path
from carve_kernels.cli.output import one_line, replace_files, say, stages, versions
from carve_kernels.cli.tables import Cell, screen, show, table

_KIND = "carve_kernels.check"
_TIMED = ("stage", "backend", "case", "measured, us", "in a graph", "call on the host", "predicted, not timed", "ratio")


def check(
    device: Annotated[str, typer.Option("--device", help="auto, cuda, cuda:1, cpu, ...")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and small problems: takes seconds, and its times mean nothing.")
    ] = False,
    output: Annotated[str, path("JSON file with every case, error and time.", "--output", "-o")] = "check.json",
) -> None:
    """Check every kernel of a device against the reference, time it, and write a report to share."""
    from carve_kernels import checks
    from carve_kernels.cli.ours import is_json

    file = checks.path("output", output).absolute()
    if not file.parent.is_dir():
        raise ValueError(f"output: {file.parent} is not a folder; choose another --output")
    chosen = device_of(device)
    with replace_files(file.parent, [file.name], is_json(_KIND)) as folder:
        from carve_kernels import selfcheck

        with stages(selfcheck.count(quick=quick)) as announce:
            results = selfcheck.examine(chosen, quick=quick, announce=announce)
        report = {"format": f"{_KIND}/1", "quick": quick, "machine": _machine(chosen), **results}
        text = json.dumps(report, indent=1, allow_nan=False)
        (folder / file.name).write_text(text + "\n", encoding="utf-8")
    wrong = _show(report)
    print(f"Written: {output}")
    if wrong:
        raise typer.Exit(1)


def _show(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Print a report; return the cases that are wrong."""
    console = screen()
    machine = report["machine"]
    console.print(Text(f"{machine['device']}: {machine['name']}", style="bold"))
    console.print(_cells(report))
    if report["timings"]:
        title = "Timed with flushed caches: median (p10 to p90)"
        show(console, title, _TIMED, _times(report), ("call on the host", "in a graph", "ratio"))
    if machine["device"].startswith("cuda") and report["gpu"] is None:
        console.print("No prediction: the rates of this GPU are not known, neither by its name nor by its memory.")
    if all(entry["backend"] == "reference" for entry in report["checks"]):
        console.print(Text("No kernel serves this device: only the reference was checked.", style="yellow"))
    wrong = [entry for entry in report["checks"] if entry["right"] is False]
    for entry in wrong:
        problem = one_line(entry["problem"])
        say(f"wrong: {entry['stage']}, backend {entry['backend']}, {entry['case']}: {problem}", "bold red")
    right = sum(entry["right"] is True for entry in report["checks"])
    verdict = f"{len(wrong)} of {right + len(wrong)} cases are wrong." if wrong else f"All {right} cases are right."
    console.print(Text(verdict, style="bold red" if wrong else "bold green"))
    return wrong


def _cells(report: dict[str, Any]) -> Table:
    """A row for each stage and backend: how many cases are right, and the one closest to its limit; or why none ran."""
    lines: list[Sequence[Cell]] = []
    for cell in report["backends"]:
        stage, backend = cell["stage"], cell["backend"]
        entries = [entry for entry in report["checks"] if (entry["stage"], entry["backend"]) == (stage, backend)]
        if cell["unavailable"] is not None:
            lines.append((stage, backend, "-", "all", one_line(cell["unavailable"])))
            continue
        judged = [entry for entry in entries if entry["right"] is not None]
        right = [entry for entry in judged if entry["right"]]
        shares = [(entry["error"] / entry["allowed"], entry) for entry in right if entry["allowed"]]
        closest = "identical" if right and not shares else "-"
        if shares:
            share, entry = max(shares, key=lambda pair: pair[0])
            closest = f"{entry['error']:.1e} of {entry['allowed']:.1e} ({share:.0%}): {entry['case']}"
        count = Text(f"{len(right)} of {len(judged)}", style="green" if len(right) == len(judged) else "bold red")
        lines.append((stage, backend, count, str(len(entries) - len(judged)), closest))
    columns = ("stage", "backend", "right", "not served", "closest")
    return table("Checked against the reference in float64", columns, lines)


def _times(report: dict[str, Any]) -> list[Sequence[Cell]]:
    lines: list[Sequence[Cell]] = []
    for entry in report["timings"]:
        predicted, ratio = "-", "-"
        if entry["predicted"] is not None:
            least = entry["predicted"]["device"]
            predicted = f"{_figure(1e6 * least['seconds'])} {least['bound']}"
            ratio = f"{entry['seconds']['median'] / least['seconds']:.3g}"
        spreads = (_spread(entry[name]) for name in ("seconds", "graph", "host"))
        lines.append((entry["stage"], entry["backend"], entry["case"], *spreads, predicted, ratio))
    return lines


def _spread(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    low, middle, high = (1e6 * spread[name] for name in ("p10", "median", "p90"))
    return f"{_figure(middle)} ({_figure(low)} to {_figure(high)})"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _machine(device: Any) -> dict[str, Any]:
    """The machine that the numbers belong to."""
    import torch

    facts: dict[str, Any] = {
        "device": str(device),
        "name": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "versions": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
        more = ("memory_clock_rate", "memory_bus_width", "clock_rate")
        facts |= {name: getattr(properties, name, None) for name in (*names, *more)}
    return facts
