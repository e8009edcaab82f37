"""Table lines of measurements with goals, for the terminal, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.support.timing import Spread, ratio

Line = dict[str, Any]


class Goal(NamedTuple):
    """The least value of a ratio, or with `most` the largest, in the median or at a percentile."""

    ratio: str
    limit: float
    most: bool = False
    at: str = "median"

    def show(self) -> str:
        return (
            f"{self.ratio}{'' if self.at == 'median' else ' ' + self.at} {'<=' if self.most else '>='} {self.limit:g}"
        )

    def met(self, spread: Mapping[str, float]) -> bool:
        value = spread[self.at]
        return value <= self.limit if self.most else value >= self.limit


def line(
    table: str,
    labels: Mapping[str, Any],
    ratios: Mapping[str, Spread],
    goals: Iterable[Goal],
    *,
    seconds: Mapping[str, list[float]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Line:
    """One line: labels, seconds and bytes of each opponent, ratios, and whether each goal was met."""
    spreads = {name: spread._asdict() for name, spread in ratios.items()}
    judged = [goal for goal in goals if goal.ratio in spreads]
    return {
        "table": table,
        "labels": dict(labels),
        "seconds": {name: Spread.of(values)._asdict() for name, values in (seconds or {}).items()},
        "bytes": dict(sizes or {}),
        "ratios": spreads,
        "goals": [{"goal": goal.show(), "met": goal.met(spreads[goal.ratio])} for goal in judged],
    }


def over(seconds: Mapping[str, list[float]], base: str) -> dict[str, Spread]:
    """The time of every other opponent divided by that of `base`."""
    return {name: ratio(seconds, name, base) for name in seconds if name != base}


def tables(lines: list[Line]) -> list[Table]:
    result = []
    for title, heads, rows in _layout(lines, "\n"):
        table = Table(title=title)
        for head in heads:
            table.add_column(head, justify="left" if head == "goals" else "right")
        for row in rows:
            table.add_row(*row)
        result.append(table)
    return result


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report as Markdown, after its command and machine."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    parts = [f"Command: `{report['command']}`\n\nMachine: {machine}.\n"]
    for title, heads, rows in _layout(report["results"], "<br>"):
        body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"### {title}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n{body}\n")
    return "\n".join(parts)


def _layout(lines: list[Line], newline: str) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and rows of each table: labels, medians in ms, MiB, ratios as median (p10-p90), goals."""
    for title in dict.fromkeys(entry["table"] for entry in lines):
        chosen = [entry for entry in lines if entry["table"] == title]
        labels, opponents = _names(chosen, "labels"), _names(chosen, "seconds", "bytes", "ratios")
        rows = [
            [
                *(str(entry["labels"].get(name, "-")) for name in labels),
                *(_cell(entry, name, newline) for name in opponents),
                newline.join(f"{goal['goal']}: {'met' if goal['met'] else 'MISSED'}" for goal in entry["goals"]) or "-",
            ]
            for entry in chosen
        ]
        yield title, [*labels, *opponents, "goals"], rows


def _names(lines: list[Line], *parts: str) -> list[str]:
    return list(dict.fromkeys(name for part in parts for entry in lines for name in entry.get(part, ())))


def _cell(entry: Line, name: str, newline: str) -> str:
    parts = []
    if name in entry["seconds"]:
        parts.append(f"{1e3 * entry['seconds'][name]['median']:.3g}")
    if name in entry.get("bytes", ()):
        parts.append(f"{entry['bytes'][name] / 2**20:.1f}")
    if name in entry["ratios"]:
        parts.append(("x " if parts else "") + Spread(**entry["ratios"][name]).show(digits=4))
    return newline.join(parts) or "-"
