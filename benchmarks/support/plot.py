"""A plot of the measured rows of a report, with matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.support.reports import Row, rows
from benchmarks.support.timing import Spread

KINDS = (".png", ".pdf", ".svg")
# Inches of a row, and around the rows of a table.
_ROW, _FRAME, _WIDTH = 0.3, 1.3, 11.0


def unusable(path: Path) -> str | None:
    """Why no plot can be written to this file; its folder is not looked at."""
    if path.suffix.lower() not in KINDS:
        return f"expected a file that ends in {', '.join(KINDS)}, got {path.name}"
    if find_spec("matplotlib") is None:
        return "expected matplotlib, got none: pip install matplotlib"
    return None


def write(report: Mapping[str, Any], path: Path) -> None:
    """Points at the medians, from p10 to p90, a panel for each table and measure, a line for each row."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], dict[Row, Spread]] = {}
    for row, spread in rows(report).items():
        panels.setdefault((row.table, row.measure), {})[row] = spread
    cases = [list(dict.fromkeys(row.case for row in panel)) for panel in panels.values()]
    heights = [_FRAME + _ROW * len(names) for names in cases]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, ((table, measure), panel), names in zip(axes, panels.items(), cases, strict=True):
        for opponent in dict.fromkeys(row.opponent for row in panel):
            points = [(names.index(row.case), spread) for row, spread in panel.items() if row.opponent == opponent]
            medians = [spread.median for _, spread in points]
            low = [max(0.0, spread.median - spread.p10) for _, spread in points]
            high = [max(0.0, spread.p90 - spread.median) for _, spread in points]
            places = [place for place, _ in points]
            axis.errorbar(medians, places, xerr=(low, high), fmt="o", markersize=4, capsize=2, label=opponent)
        axis.set_yticks(range(len(names)), [textwrap.fill(name, 60) or table for name in names], fontsize=7)
        axis.set_ylim(len(names) - 0.5, -0.5)
        if all(spread.p10 > 0 for spread in panel.values()):
            axis.set_xscale("log")
        axis.set_title(table, fontsize=9)
        axis.set_xlabel(measure, fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
