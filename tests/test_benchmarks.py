"""The benchmarks run, write what they found, and judge it by their goals."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import bench_capture, bench_engine, bench_gradients, bench_layouts, bench_session
from benchmarks.__main__ import app
from benchmarks.support import cases, engine_opponents, layout_cases, layouts, lines, memory, timing
from benchmarks.support.models import Shape
from carve_kernels.backends.native import extension
from tests.hf.layouts.families_page import checked
from tests.support import tiny_models
from tests.support.bench import run


def report_of(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    found: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    assert found["machine"]["threads"] == 1
    assert found["machine"]["torch"] == torch.__version__
    return found


def test_capture_reports_every_opponent_cold_and_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda: 2**20)
    result = run("capture", "--output", str(tmp_path / "capture.json"), "--csv", str(tmp_path / "capture.csv"))
    assert result.exit_code == 0, result.output
    check_csv(tmp_path / "capture.csv", report_of(tmp_path / "capture.json"))
    lines = report_of(tmp_path / "capture.json")["results"]
    assert [line["caches"] for line in lines] == ["cold", "warm"] * len(cases.QUICK)
    for line in lines:
        names = {"capture", "capture reference", "(a) eager", "(b) repeat", "(c) folded", "(f) read"}
        assert names <= set(line["seconds"])
        assert set(line["ratio_to_capture"]) == set(line["seconds"]) - {"capture"}
        assert all(0 < spread["p10"] <= spread["median"] <= spread["p90"] for spread in line["seconds"].values())
    assert "(c) folded" in result.output


def check_csv(path: Path, report: dict[str, Any]) -> None:
    """Every opponent of every case, with the numbers of the report."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == sum(len(line["seconds"]) + len(line["ratio_to_capture"]) for line in report["results"])
    line = report["results"][-1]
    (row,) = [
        row for row in found
        if all(row[f"label.{name}"] == str(line[name]) for name in ("geometry", "length", "rows", "dtype", "caches"))
        and (row["opponent"], row["measure"]) == ("(c) folded", "seconds")
    ]  # fmt: skip
    assert {name: float(row[name]) for name in ("median", "p10", "p90")}.items() <= line["seconds"][
        "(c) folded"
    ].items()


def test_session_reports_seconds_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = memory.in_fresh_process

    def mostly_here(module: str, task: dict[str, Any]) -> Any:
        # A process takes seconds to import torch: one shows that it works.
        return fresh(module, task) if task["what"] == memory.SESSION else memory.measure_here(task)._asdict()

    monkeypatch.setattr(memory, "in_fresh_process", mostly_here)
    result = run("session", "--output", str(tmp_path / "session.json"))
    assert result.exit_code == 0, result.output
    found = report_of(tmp_path / "session.json")["results"]
    assert [line["new_tokens"] for line in found["price"]] == [1, 2]
    assert all(set(line["seconds"]) == {"plain", "session", "eager"} for line in found["price"])
    (peaks,) = found["memory"]
    assert peaks["eager_measured"] and peaks["bound"] == 2 * 128 * 4


def test_layouts_reports_every_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # test_session_reports starts a process; this would take as long again.
    monkeypatch.setattr(memory, "in_fresh_process", lambda _, task, **__: layouts.measure_here(task))
    files = tmp_path / "layouts.json", tmp_path / "layouts.md"
    result = run("layouts", "--output", str(files[0]), "--markdown", str(files[1]))
    assert result.exit_code == 0, result.output
    found = report_of(files[0])["results"]
    assert [line["labels"]["name"] for line in found] == list(bench_layouts.QUICK)
    assert [line["labels"]["tokens"] for line in found] == [990, 1024]
    for line in found:
        assert len(line["ratios"]) == 4 and all(
            0 < spread["p10"] <= spread["p90"] for spread in line["ratios"].values()
        )
    assert "layout_of, of the process" in files[1].read_text()
    assert run("layouts", "--family", "nothing").exit_code == 2


def test_layouts_has_every_family() -> None:
    assert set(layout_cases.CASES) == {each.name for each in checked()}


def test_engine_reports_every_opponent_against_its_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # test_session_reports starts processes; these would take as long again.
    monkeypatch.setattr(
        engine_opponents, "in_fresh_process", lambda _, task: engine_opponents.measure_here(task)._asdict()
    )
    files = tmp_path / "engine.json", tmp_path / "engine.md"
    result = run("engine", "--output", str(files[0]), "--markdown", str(files[1]))
    assert result.exit_code == 0, result.output
    found: dict[str, list[Any]] = {}
    for line in report_of(files[0])["results"]:
        found.setdefault(line["table"].partition(":")[0], []).append(line)
    cells = [(preset, visual) for preset in ("paper", "release") for visual in (16, 64)]
    names = {"(a) engine", "second question", "(b) eager", "(c) release", "(d) plain + refined"}
    labels = [line["labels"] for line in found["engine"]]
    assert [(each["preset"], each["visual tokens"]) for each in labels] == cells * 2
    assert all(set(line["seconds"]) == names for line in found["engine"][:4])
    assert {"(a) / (d)", "(b) / (a)", "(c) / (a)", "eager / sdpa"} <= set(found["engine"][4]["ratios"])
    assert [line["labels"]["to"] for line in found["growth with the visual tokens"]] == [64, 64]
    assert not any(line["goals"] for lines in found.values() for line in lines)
    for line in found["work"]:
        check_work(line["labels"])
    (peaks,) = found["peak memory"]
    assert peaks["ratios"]["((a) - (d)) / one prefix"]["median"] > 0
    assert peaks["bytes"]["(d) plain + refined"] > peaks["bytes"]["one prefix"] > 0
    assert "### engine: ratios" in files[1].read_text()


def test_engine_measures_a_checkpoint_against_every_opponent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine_opponents, "in_fresh_process", lambda _, task: engine_opponents.measure_here(task)._asdict()
    )
    checkpoint = tiny_models.save(*tiny_models.tiny_llava(), tmp_path / "mine")
    files = tmp_path / "engine.json", tmp_path / "engine.csv"
    result = run("engine", "--model", str(checkpoint), "--output", str(files[0]), "--csv", str(files[1]))
    assert result.exit_code == 0, result.output
    report = report_of(files[0])
    assert report["settings"]["model"] == "mine" and "hidden" not in report["settings"]
    found: dict[str, list[Any]] = {}
    for line in report["results"]:
        found.setdefault(line["table"].partition(":")[0], []).append(line)
    names = {"(a) engine", "second question", "(b) eager", "(c) release", "(d) plain + refined"}
    assert all(set(line["seconds"]) == names for line in found["engine"][:2])
    assert [line["labels"]["visual tokens"] for line in found["engine"]] == [36] * 4
    for line in found["work"]:
        check_work(line["labels"])
    (peaks,) = found["peak memory"]
    assert peaks["bytes"]["one prefix"] > 0
    assert {"first pass", "second pass"} <= set(found["stages of the engine"][0]["seconds"])
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["label.model"] for row in rows} == {"mine"}
    assert {row["opponent"] for row in rows if row["measure"] == "bytes"} == set(peaks["bytes"])


def test_growth_is_of_medians() -> None:
    found = {("paper", 8): [(1024, [1.0, 9.0, 1.1]), (256, [1.0, 5.0, 0.9])], ("release", 8): [(256, [1.0])]}
    (growth,) = bench_engine._growth(found)
    assert growth["ratios"]["growth of (a) / (d)"]["median"] == pytest.approx(1.1)
    assert growth["labels"]["from"] == 256 and not growth["goals"][0]["met"]


def check_work(labels: dict[str, Any]) -> None:
    """The engine encodes an image once; the second question about it only encodes the refined one."""
    work = {name: tuple(map(int, cell.split(" + "))) for name, cell in labels.items() if " + " in str(cell)}
    tokens, images = ({name: counts[index] for name, counts in work.items()} for index in (0, 1))
    two = labels["preset"] == "release"
    assert images["(a) engine"] == images["(d) plain + refined"] == 2
    assert images["second question"] == 1
    # Two prompts and the second pass, which under `release` has both images; one call encodes both.
    assert images["(b) eager"] == 3 and images["(c) release"] == 2 * labels["new tokens"] + 1
    assert tokens["second question"] < tokens["(a) engine"] - labels["visual tokens"]
    assert tokens["(a) engine"] < tokens["(d) plain + refined"] + labels["visual tokens"] // (1 if two else 2) + 32


def test_cpu_reports_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_capture, "last_level_cache", lambda: 2**20)
    files = tmp_path / "cpu.json", tmp_path / "cpu.md"
    result = run("cpu", "--output", str(files[0]), "--markdown", str(files[1]))
    assert result.exit_code == 0, result.output
    report = report_of(files[0])
    found: dict[str, list[Any]] = {}
    for line in report["results"]:
        found.setdefault(line["table"].partition(":")[0], []).append(line)
    assert [line["labels"]["caches"] for line in found["capture"]] == ["warm", "cold"] * 2
    ways = {"capture", "(b) repeat", "(c) folded", "(d) folded fp32", "(f) read"}
    assert all(ways <= set(line["seconds"]) for line in found["capture"])
    # SmolVLM: three heads of 64 for each KV head.
    assert [line["labels"]["products a key"] for line in found["capture"]] == [192, 192, 1536, 1536]
    for line in found["capture"]:
        products = 9 * 512 * 64 * line["labels"]["R"]
        assert line["ratios"]["products a ns"]["median"] == pytest.approx(
            1e-9 * products / line["seconds"]["capture"]["median"]
        )
        assert ", torch " in line["labels"]["instructions"] and " and oneDNN " in line["labels"]["instructions"]
    assert set(found["contrast"][0]["ratios"]) == {"torch", "(f) fill", "(d) release"}
    assert [line["labels"]["saliency"] for line in found["regions"]] == ["smooth", "white noise"]
    assert {"decode step", "captures of a prefill", "one row", "call overhead"} <= set(found)
    assert files[1].read_text().startswith("Command: `python -m benchmarks")
    assert all(f"### {line['table']}" in files[1].read_text() for line in report["results"])


@pytest.mark.parametrize(
    ("name", "limits"), [("avx2", "avx2 AVX2"), ("avx512_bf16", "avx512 AVX512_CORE_BF16"), ("amx", "None None")]
)
def test_opponents_get_no_more_instructions_than_the_kernels(name: str, limits: str) -> None:
    program = "import os, benchmarks; print(*map(os.environ.get, ('ATEN_CPU_CAPABILITY', 'ONEDNN_MAX_CPU_ISA')))"
    environment = {"PATH": os.environ["PATH"], "CARVE_KERNELS_CPU": name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == limits


def test_a_cold_call_reads_the_least_recently_read_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_capture, "last_level_cache", lambda: 2**16)
    copies = bench_capture.KeyCopies()
    key = torch.randn(1, 2, 8, 64)
    copies.fill(key)
    assert sum(copy.nbytes for copy in copies.keys) > 2**16
    assert len({copy.data_ptr() for copy in copies.keys}) == len(copies.keys)
    assert all(torch.equal(copy, key) for copy in copies.keys)
    order = []
    for _ in range(len(copies.keys) + 1):
        copies(lambda: None)
        order.append(copies.turn)
    assert order == [*range(1, len(copies.keys)), 0, 1]


@pytest.mark.parametrize(("value", "most", "met"), [(2.0, False, True), (1.9, False, False), (2.1, True, False)])
def test_a_goal_is_met_or_missed(value: float, most: bool, met: bool) -> None:
    spread = timing.Spread(value, 0.0, 9.0, 3)
    goals = [lines.Goal("way", 2.0, most), lines.Goal("absent", 1.0)]
    (goal,) = lines.line("table", {}, {"way": spread}, goals)["goals"]
    assert goal == {"goal": f"way {'<=' if most else '>='} 2", "met": met}


def test_visual_tokens_must_be_squares() -> None:
    result = CliRunner().invoke(app, ["engine", "--visual", "200"])
    assert result.exit_code == 2


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    result = run("capture", "--output", str(tmp_path / "missing" / "capture.json"))
    assert result.exit_code == 2


class Once:
    """Replaces the fixture of pytest-benchmark."""

    group = ""

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        return run(*args)


def test_the_forms_for_pytest_run() -> None:
    benchmark = Once()
    bench_capture.test_capture(benchmark, cases.QUICK[0], "(c) folded")
    assert benchmark.group == str(cases.QUICK[0])
    bench_session.test_generate(benchmark, "float32", bench_session.SESSION)


def test_rounds_are_paired_and_the_budget_ends_them() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ABC"}
    seconds = timing.paired(runs, rounds=9, before=timing.no_preparation, budget=0.0, least=2)
    assert "".join(order) == "ABC" * 3
    assert [len(values) for values in seconds.values()] == [2, 2, 2]
    assert timing.ratio({"A": [2.0, 9.0], "B": [1.0, 3.0]}, "A", "B").median == 2.5


def test_a_geometry_keeps_its_groups() -> None:
    assert (Shape(28, 1024, "bfloat16").heads, Shape(28, 1024, "bfloat16").key_heads) == (8, 2)
    assert Shape(2, 256, "float32").key_heads == 1


def test_gradients_reports_seconds_and_memory(tmp_path: Path) -> None:
    if reason := extension.unavailable():
        pytest.skip(reason)
    files = [str(tmp_path / f"gradients.{kind}") for kind in ("json", "md")]
    result = run("gradients", "--output", files[0], "--markdown", files[1])
    assert result.exit_code == 0, result.output
    found = report_of(tmp_path / "gradients.json")["results"]
    timed = [entry for entry in found if entry["seconds"]]
    assert [entry["labels"]["keys"] for entry in timed] == [each for each in bench_gradients.QUICK for _ in range(2)]
    assert all(set(entry["seconds"]) == {"cpu", "plain torch", "autograd of eager"} for entry in timed)
    first, second = found[len(timed) :]
    assert second["ratios"]["peak, times the first"]["median"] < 2.2
    assert 0 < first["ratios"]["peak"]["median"] < second["ratios"]["peak"]["median"]
    assert "peak memory of a capture" in (tmp_path / "gradients.md").read_text()


def test_gradients_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := extension.unavailable():
        pytest.skip(reason)
    right = bench_gradients.cpu.backward
    monkeypatch.setattr(
        bench_gradients.cpu, "backward", lambda *given, **more: (right(*given, **more)[0] * 1.001, *right(*given)[1:])
    )
    result = run("gradients")
    assert result.exit_code == 1 and "cpu, 128 keys in float32: the gradient of the query" in result.output
