"""Lines of a table that hold a measurement against its goals, for the terminal, for JSON and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.timing import Spread, ratio

Line = dict[str, Any]


class Goal(NamedTuple):
    """What a ratio of a line must reach at least, or must not pass, in the median or at a percentile."""

    ratio: str
    limit: float
    most: bool = False
    at: str = "median"

    def show(self) -> str:
        return (
            f"{self.ratio}{'' if self.at == 'median' else ' ' + self.at} {'<=' if self.most else '>='} {self.limit:g}"
        )

    def met(self, spread: Mapping[str, float]) -> bool:
        found = spread[self.at]
        return found <= self.limit if self.most else found >= self.limit


def line(
    table: str,
    labels: Mapping[str, Any],
    ratios: Mapping[str, Spread],
    goals: Iterable[Goal],
    *,
    seconds: Mapping[str, list[float]] | None = None,
) -> Line:
    """One line: what it is, seconds of each way, ratios, and each goal with whether it was met."""
    spreads = {name: spread._asdict() for name, spread in ratios.items()}
    held = [goal for goal in goals if goal.ratio in spreads]
    return {
        "table": table,
        "labels": dict(labels),
        "seconds": {name: Spread.of(values)._asdict() for name, values in (seconds or {}).items()},
        "ratios": spreads,
        "goals": [{"goal": goal.show(), "met": goal.met(spreads[goal.ratio])} for goal in held],
    }


def over(seconds: Mapping[str, list[float]], own: str) -> dict[str, Spread]:
    """How many times the time of `own` every other way takes."""
    return {name: ratio(seconds, name, own) for name in seconds if name != own}


def tables(lines: list[Line]) -> list[Table]:
    found = []
    for title, heads, rows in _laid_out(lines, "\n"):
        table = Table(title=title)
        for head in heads:
            table.add_column(head, justify="left" if head == "goals" else "right")
        for row in rows:
            table.add_row(*row)
        found.append(table)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report as Markdown, with machine and command in front."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    parts = [f"Command: `{report['command']}`\n\nMachine: {machine}.\n"]
    for title, heads, rows in _laid_out(report["results"], "<br>"):
        body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"### {title}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n{body}\n")
    return "\n".join(parts)


def _laid_out(lines: list[Line], newline: str) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and rows of each table: labels, medians in ms, ratios as median (p10-p90), goals."""
    for title in dict.fromkeys(entry["table"] for entry in lines):
        chosen = [entry for entry in lines if entry["table"] == title]
        labels, ways = _names(chosen, "labels"), _names(chosen, "seconds", "ratios")
        rows = [
            [
                *(str(entry["labels"].get(name, "-")) for name in labels),
                *(_cell(entry, name, newline) for name in ways),
                newline.join(f"{goal['goal']}: {'met' if goal['met'] else 'MISSED'}" for goal in entry["goals"]) or "-",
            ]
            for entry in chosen
        ]
        yield title, [*labels, *ways, "goals"], rows


def _names(lines: list[Line], *parts: str) -> list[str]:
    return list(dict.fromkeys(name for part in parts for entry in lines for name in entry[part]))


def _cell(entry: Line, name: str, newline: str) -> str:
    found = []
    if name in entry["seconds"]:
        found.append(f"{1e3 * entry['seconds'][name]['median']:.3g}")
    if name in entry["ratios"]:
        found.append(("x " if found else "") + Spread(**entry["ratios"][name]).show(digits=4))
    return newline.join(found) or "-"
