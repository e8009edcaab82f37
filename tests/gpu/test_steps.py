"""`make gpu` without a GPU: steps that pass, fail, hang or cannot run, within one budget, and what is written."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import __main__ as command
from tests.gpu import library, small_calls
from tests.gpu.steps import FAILED, PASSED, SKIPPED, Outcome, Step, run_all

CPU = torch.device("cpu")


def step(name: str, program: str, most: float = 60.0, **more: Any) -> Step:
    return Step(name, lambda _seconds: (sys.executable, "-c", program), most, more.pop("least", 0.0), **more)


def run(folder: Path, *steps: Step, budget: float = 60.0) -> list[Outcome]:
    said: list[str] = []
    outcomes = run_all(steps, folder, budget, head="A card.", announce=said.append)
    assert len(said) == len(outcomes) == len(steps)
    return outcomes


def test_every_step_is_summed_up(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    outcomes = run(
        tmp_path,
        step("one", "print('a'); print('all | right')"),
        step("two", "import sys; print('half'); sys.exit('it broke')"),
        step("three", "", skip="there is no tool"),
        step("four", "print('ERROR SUMMARY: 2 errors')", expected="ERROR SUMMARY: 0 errors"),
        Step("five", lambda _seconds: ("/nowhere/at/all",), 60.0, 0.0),
        step("six", f"import os; open({str(marker)!r}, 'w').write(os.environ['MORE'])", more={"MORE": "it is here"}),
    )
    assert [outcome.result for outcome in outcomes] == [PASSED, FAILED, SKIPPED, FAILED, FAILED, PASSED]
    assert [outcome.said for outcome in outcomes[:3]] == ["all | right", "status 1: it broke", "there is no tool"]
    assert "has no 'ERROR SUMMARY: 0 errors'" in outcomes[3].said and "does not start" in outcomes[4].said
    assert outcomes[5].said == "it printed nothing" and marker.read_text() == "it is here"
    text = (tmp_path / "summary.md").read_text()
    assert "A card." in text and "| one | passed | 0 | all / right |" in text and "| three | skipped | 0 |" in text
    assert "half" in (tmp_path / "two.log").read_text()


def test_a_step_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    hung, after = run(tmp_path, step("hangs", program, most=1.0), step("after", "print('runs')"))
    assert time.monotonic() - start < 20
    assert hung.result == FAILED and "ended at its limit of 1 s" in hung.said and after.result == PASSED
    child = int((tmp_path / "hangs.log").read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(number: int) -> bool:
    """Whether a process runs; one that has ended and that no parent has waited for does not."""
    try:
        return " Z " not in Path(f"/proc/{number}/stat").read_text()
    except FileNotFoundError:
        return False


def test_later_steps_keep_their_share_of_the_budget(tmp_path: Path) -> None:
    given: list[float] = []

    def noted(name: str, most: float, least: float, **more: Any) -> Step:
        def start(seconds: float) -> Sequence[str]:
            given.append(seconds)
            return (sys.executable, "-c", "")

        return Step(name, start, most, least, **more)

    outcomes = run(
        tmp_path, noted("a", 50, 0), noted("b", 900, 10), noted("c", 900, 20), noted("d", 900, 500),
        noted("e", 1, 1, skip="no"), budget=600,
    )  # fmt: skip
    # Less what starting three processes took.
    assert given == [pytest.approx(wanted, abs=12) for wanted in (50, 80, 100, 600)]
    assert [outcome.result for outcome in outcomes] == [PASSED] * 4 + [SKIPPED]
    (short,) = run(tmp_path, noted("f", 900, 100), budget=5)
    assert short.result == SKIPPED and short.said == "5 s were left, it needs 100"


def test_the_summary_is_written_after_every_step(tmp_path: Path) -> None:
    program = f"print(open({str(tmp_path / 'summary.md')!r}).read().splitlines()[-1])"
    _, reader, _ = run(tmp_path, step("first", ""), step("second", program), step("third", ""))
    assert reader.said == "Not run yet: second, third."


def chosen(monkeypatch: pytest.MonkeyPatch, missing: str | None, tools: Sequence[str]) -> dict[str, Step]:
    monkeypatch.setattr(command.shutil, "which", lambda name: f"/bin/{name}" if name in tools else None)
    return {one.name: one for one in command.steps(Path("/folder"), missing=missing)}


def test_the_steps_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = chosen(monkeypatch, None, ["compute-sanitizer"])
    assert list(steps) == ["build", "doctor", "tests", "memcheck", "racecheck", "benchmarks"]
    assert [one.name for one in steps.values() if one.skip is not None] == ["build"]
    assert "-n" in steps["tests"].command(9) and steps["memcheck"].command(9)[0] == "/bin/compute-sanitizer"
    words = steps["benchmarks"].command(300.0)
    assert words[words.index("--budget") + 1] == "270" and words[-1] == "/folder/benchmarks.json"
    # Logs, the numbers and the summary.
    assert len(steps) + 2 <= 8
    assert sum(one.least for one in steps.values()) < command.SECONDS
    steps = chosen(monkeypatch, "not built", [])
    assert [one.name for one in steps.values() if one.skip is not None] == ["memcheck", "racecheck"]
    monkeypatch.setattr(command, "find_spec", lambda _name: None)
    assert "-n" not in chosen(monkeypatch, None, [])["tests"].command(9)


@pytest.mark.parametrize(("results", "status"), [((PASSED, SKIPPED), 0), ((PASSED, FAILED), 1)])
def test_the_status_tells_whether_what_ran_passed(
    results: Sequence[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(_steps: object, folder: Path, budget: float, **_more: object) -> list[Outcome]:
        assert budget == 77.0
        (folder / "one.log").write_text("new")
        return [Outcome(str(index), result, 1.0, "") for index, result in enumerate(results)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A card")
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(command, "run_all", fake)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "two.log").write_text("of an earlier run")
    assert command.main(["--output", str(tmp_path), "--seconds", "77"]) == status
    assert [path.name for path in tmp_path.iterdir()] == ["one.log"]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_a_library_that_serves_no_gpu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert library.missing()

    class Done:
        returncode = 1

    ran: list[dict[str, Any]] = []
    monkeypatch.setattr(
        library.subprocess, "run", lambda command, **more: ran.append({"command": command, **more}) or Done
    )
    assert library.build((9, 0)) == f"{sys.executable} setup.py build_ext --inplace ended with status 1"
    assert ran[0]["env"]["CARVE_KERNELS_CUDA_ARCHITECTURES"] == "90"
    assert ran[0]["env"]["CARVE_KERNELS_BUILD"] == "required" and "PATH" in os.environ


def test_the_small_calls_are_right_and_wrong_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = small_calls.trials
    monkeypatch.setattr(small_calls, "trials", lambda *, quick: honest(quick=True))
    said: list[str] = []
    assert small_calls.run(CPU, ("reference",), said.append) == []
    assert said and int(said[0].split()[1]) > 8

    def shifted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*arguments: Any, **options: Any) -> Any:
            found = call(*arguments, **options)
            return found._replace(maps=found.maps + 1e-3) if hasattr(found, "maps") else found

        return wrong

    built = [build() for build in honest(quick=True)]
    broken = [trial._replace(call=shifted(trial.call)) for trial in built]
    monkeypatch.setattr(small_calls, "trials", lambda *, quick: [lambda one=one: one for one in broken])
    problems = small_calls.run(CPU, ("reference",), said.append)
    assert any("capture, one row" in problem for problem in problems)
