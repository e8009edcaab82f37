"""The measured rows of a report, their comparison with those of another report, and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.support.timing import Spread

SECONDS, RATIO, BYTES = "seconds", "ratio", "bytes"
# The load is never the same; the command also names files.
_VARYING = ("load",)
# Labels that say what was measured or predicted, or of which machine, and not which row it is.
_FINDINGS = ("instructions", "error", "other pixels", "sum", "compiled parts without a graph")
_FINDING_ENDS = (", us",)


class NoReport(ValueError):
    """A file is not a report with measured rows."""


class Row(NamedTuple):
    """What was measured of one opponent; `turn` numbers rows that are otherwise the same.

    A `ratio` is one to the time of the table's first opponent, or has the unit that the table or the row is named with.
    """

    table: str
    labels: tuple[tuple[str, str], ...]
    opponent: str
    measure: str
    turn: int = 0

    @property
    def case(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.labels)

    def __str__(self) -> str:
        return ", ".join(part for part in (self.table, self.case, self.opponent, self.measure) if part)


def read(path: Path) -> dict[str, Any]:
    """A report that `--output` wrote. Raises NoReport with the reason where the file is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NoReport(f"{path}: expected a report of --output, got a file that cannot be read: {error}") from error
    try:
        found = rows(report)
        described = report["machine"], report.get("settings", {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NoReport(f"{path}: expected a report of --output, got other JSON") from error
    if not all(isinstance(part, dict) for part in described):
        raise NoReport(f"{path}: expected a report of --output, got one whose machine or settings have no names")
    if not found:
        raise NoReport(f"{path}: expected a report with measured rows, got none in it")
    return dict(report)


def rows(report: Mapping[str, Any]) -> dict[Row, Spread]:
    """Every measured row with its spread."""
    found: dict[Row, Spread] = {}
    for row, spread in _measured(report["benchmark"], report["results"]):
        while row in found:
            row = row._replace(turn=row.turn + 1)
        found[row] = spread
    return found


def _measured(benchmark: str, results: Any) -> Iterator[tuple[Row, Spread]]:
    if benchmark == "session":
        results = [*results["price"], *results["memory"]]
    for entry in results:
        if "table" in entry:
            labels = {name: value for name, value in entry["labels"].items() if not _is_finding(name)}
            yield from _spreads(entry["table"], labels, entry["seconds"], entry["ratios"])
            yield from _sizes(entry["table"], labels, entry.get("bytes", {}))
        elif "seconds" in entry:
            labels = {name: entry[name] for name in _CASE if name in entry}
            others = next((entry[name] for name in ("ratio_to_capture", "ratio_to_plain") if name in entry), {})
            yield from _spreads(benchmark, labels, entry["seconds"], others)
        elif "session_extra" in entry:
            labels = {name: entry[name] for name in ("length", "rows")}
            parts = (("plain", entry["plain"]), ("session - plain", entry["session_extra"]))
            sizes = {f"{part}, {name}": value for part, count in parts for name, value in count.items()}
            yield from _sizes("peak memory", labels, sizes)


_CASE = ("geometry", "length", "rows", "dtype", "caches", "new_tokens")


def _is_finding(name: str) -> bool:
    return name in _FINDINGS or name.endswith(_FINDING_ENDS)


def _spreads(
    table: str, labels: Mapping[str, Any], seconds: Mapping[str, Any], ratios: Mapping[str, Any]
) -> Iterator[tuple[Row, Spread]]:
    for measure, spreads in ((SECONDS, seconds), (RATIO, ratios)):
        for opponent, spread in spreads.items():
            median, p10, p90, rounds = (spread[name] for name in Spread._fields)
            measured = Spread(float(median), float(p10), float(p90), int(rounds))
            yield Row(table, _texts(labels), opponent, measure), measured


def _sizes(table: str, labels: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[tuple[Row, Spread]]:
    for opponent, value in sizes.items():
        yield Row(table, _texts(labels), opponent, BYTES), Spread(value, value, value, 1)


def _texts(labels: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in labels.items())


def over(spread: Spread, base: Spread) -> Spread:
    """The median over the base's, from the least to the most that their p10 and p90 allow.

    The runs were not timed in turns, so that their rounds are not pairs.
    """
    if not all(value > 0 for value in (base.median, base.p10, base.p90)):
        return Spread(math.nan, math.nan, math.nan, min(spread.rounds, base.rounds))
    return Spread(
        spread.median / base.median, spread.p10 / base.p90, spread.p90 / base.p10, min(spread.rounds, base.rounds)
    )


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between the benchmarks, machines, versions and settings of two reports, by name."""
    pairs: list[tuple[str, Any, Any]] = [("benchmark", first["benchmark"], second["benchmark"])]
    for part in ("machine", "settings"):
        one, other = first.get(part, {}), second.get(part, {})
        names = [name for name in dict.fromkeys((*one, *other)) if name not in _VARYING]
        pairs += [(f"{part}: {name}", one.get(name), other.get(name)) for name in names]
    return [f"{name} is {one} in A and {other} in B" for name, one, other in pairs if one != other]


def missing(first: Mapping[Row, Spread], second: Mapping[Row, Spread]) -> list[str]:
    """The rows that only one of the reports has."""
    return [
        f"only {name} has {row}"
        for name, one, other in (("A", first, second), ("B", second, first))
        for row in one
        if row not in other
    ]


def comparison(first: Mapping[Row, Spread], second: Mapping[Row, Spread]) -> list[Table]:
    """A table for each table of the reports: both medians, and B / A as median (least-most)."""
    shared = [row for row in first if row in second]
    tables = []
    for title in dict.fromkeys(row.table for row in shared):
        table = Table(title=title)
        for head in ("row", "opponent", "measure", "A", "B", "B / A"):
            table.add_column(head, justify="left" if head in ("row", "opponent", "measure") else "right")
        for row in (row for row in shared if row.table == title):
            one, other = first[row], second[row]
            ratio = over(other, one)
            shown = "-" if math.isnan(ratio.median) else ratio.show(digits=4)
            table.add_row(row.case, row.opponent, row.measure, f"{one.median:.4g}", f"{other.median:.4g}", shown)
        tables.append(table)
    return tables


def write_csv(report: Mapping[str, Any], path: Path) -> None:
    """A line for each row: its labels in columns `label.NAME`, then its spread."""
    found = rows(report)
    labels = list(dict.fromkeys(name for row in found for name, _ in row.labels))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        fixed = ("benchmark", "table", "opponent", "measure", "turn")
        writer.writerow([*fixed, *(f"label.{name}" for name in labels), *Spread._fields])
        for row, spread in found.items():
            values = dict(row.labels)
            named = (report["benchmark"], row.table, row.opponent, row.measure, row.turn)
            writer.writerow([*named, *(values.get(name, "") for name in labels), *spread])
