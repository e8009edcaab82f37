"""Reports of the benchmarks are compared row by row, and plotted."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from benchmarks.__main__ import app
from benchmarks.support import lines, plot, reports
from benchmarks.support.timing import Spread
from tests.support.bench import run


def report(factor: float = 1.0) -> dict[str, Any]:
    """A report with one table, in which everything took `factor` times as long."""
    entries = [
        lines.line(
            "step: ms, and times plain",
            {"S": length, "instructions": f"machine {factor}"},
            {"session": Spread(1.5, 1.25, 2.0, 9)},
            [],
            seconds={name: [factor * value for value in (1.0, 2.0, 4.0)] for name in ("plain", "session")},
        )
        for length in (2048, 8192)
    ]
    machine = {"processor": "one", "torch": "2.11", "load": factor}
    return {
        "benchmark": "cpu", "command": "python", "machine": machine, "settings": {"rounds": 9}, "results": entries,
    }  # fmt: skip


def compare(folder: Path, first: Any, second: Any) -> Result:
    names = []
    for name, found in (("A.json", first), ("B.json", second)):
        path = folder / name
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        names.append(str(path))
    return CliRunner().invoke(app, ["compare", *names])


def test_rows_are_compared_by_their_medians(tmp_path: Path) -> None:
    result = compare(tmp_path, report(), report(3.0))
    assert result.exit_code == 0, result.output
    # p10 and p90 of (1, 2, 4) are 1.2 and 3.6.
    assert result.output.count("3 (1-9)") == 4 and result.output.count("1 (0.625-1.6)") == 2
    assert "warning" not in result.output and "only" not in result.output


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "machine": (lambda found: found["machine"].update(processor="two"), "machine: processor is one in A and two in B"),
    "version": (lambda found: found["machine"].update(torch="2.12"), "machine: torch is 2.11 in A and 2.12 in B"),
    "settings": (lambda found: found["settings"].update(rounds=3), "settings: rounds is 9 in A and 3 in B"),
    "another setting": (lambda found: found["settings"].update(budget=6), "settings: budget is None in A and 6 in B"),
    "row": (lambda found: found["results"].pop(), "only A has step: ms, and times plain, S 8192, plain, seconds"),
    "label": (
        lambda found: found["results"][1]["labels"].update(S=4096),
        "only B has step: ms, and times plain, S 4096, session, ratio",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_named(change: str, tmp_path: Path) -> None:
    other = copy.deepcopy(report())
    CHANGES[change][0](other)
    result = compare(tmp_path, report(), other)
    assert result.exit_code == 0, result.output
    assert CHANGES[change][1] in result.output


def test_reports_without_a_row_in_common_are_an_error(tmp_path: Path) -> None:
    other = report()
    for entry in other["results"]:
        entry["table"] = "another"
    result = compare(tmp_path, report(), other)
    assert result.exit_code == 1
    assert "nothing was compared" in result.output


NO_REPORTS: dict[str, Any] = {
    "nothing": "",
    "no JSON": "no JSON",
    "a list": [],
    "a number": 3,
    "no parts": {},
    "no lines": {**report(), "results": [1]},
    "nothing measured": {**report(), "benchmark": "roofline", "results": [{"geometry": "smolvlm"}]},
    "a part of a spread": {**report(), "results": [{**report()["results"][0], "seconds": {"plain": {"median": 1}}}]},
    "no numbers": {**report(), "results": [{**report()["results"][0], "ratios": {"x": dict.fromkeys(Spread._fields)}}]},
    "settings without names": {**report(), "settings": [1]},
}


@pytest.mark.parametrize("kind", NO_REPORTS)
def test_a_file_that_is_no_report_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    result = compare(tmp_path, report(), NO_REPORTS[kind])
    assert result.exit_code == 2
    assert "B.json: expected a report" in result.output and "Traceback" not in result.output


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "none.json"), str(tmp_path / "none.json")])
    assert result.exit_code == 2
    assert "none.json: expected a report" in result.output


def test_rows_that_are_otherwise_the_same_are_numbered() -> None:
    found = report()
    found["results"].append(found["results"][0])
    assert len(reports.rows(found)) == 9


def test_the_memory_of_a_session_is_compared() -> None:
    entry = {"length": 128, "rows": 1, "plain": {"tensors": 8, "resident": 9}, "session_extra": {"tensors": 0}}
    found = reports.rows({"benchmark": "session", "results": {"price": [], "memory": [entry]}})
    assert [(row.opponent, row.measure, spread.median) for row, spread in found.items()] == [
        ("plain, tensors", "bytes", 8),
        ("plain, resident", "bytes", 9),
        ("session - plain, tensors", "bytes", 0),
    ]
    (table,) = reports.comparison(found, found)
    assert list(table.columns[-1].cells) == ["1 (1-1)", "1 (1-1)", "-"]


def test_a_plot_has_a_panel_for_each_measure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.write(report(), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count('<g id="axes_') == 2
    plot.write(report(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


UNWRITABLE = {
    "--csv": ("missing/rows.csv", "--csv"),
    "--plot": ("missing/plot.png", "--plot"),
    "another kind": ("plot.jpeg.txt", "ends in .png"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(case: str, tmp_path: Path) -> None:
    name, word = UNWRITABLE[case]
    result = run("capture", case if case.startswith("--") else "--plot", str(tmp_path / name))
    assert result.exit_code == 2
    assert word in result.output


def test_without_matplotlib_a_plot_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda _name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("capture", "--plot", str(tmp_path / "plot.png"))
    assert result.exit_code == 2
    assert "matplotlib" in result.output and not (tmp_path / "plot.png").exists()
