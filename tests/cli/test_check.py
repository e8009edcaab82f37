"""carve-kernels check: what it prints, writes and returns, with backends that are right, wrong and unavailable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels import selfcheck
from carve_kernels.backends import cpu
from carve_kernels.backends.cpu import capture as cpu_capture
from carve_kernels.types import CaptureOptions
from tests.cli.conftest import Invoke, content

STAGES = ("capture", "column_sums", "contrast", "regions")


def report_of(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    assert found["format"] == "carve_kernels.check/1"
    return found


def needs_extension() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)


def test_the_backends_of_the_cpu_are_right(carve: Invoke, tmp_path: Path) -> None:
    needs_extension()
    done = carve("check", "--device", "cpu", "--quick", "--output", tmp_path / "check.json")
    assert done.exit_code == 0, done.output
    found = report_of(tmp_path / "check.json")
    assert list(content(tmp_path)) == ["check.json"]
    assert {(entry["stage"], entry["backend"]) for entry in found["checks"]} == {
        ("attention", "reference"),
        *((stage, backend) for stage in STAGES for backend in ("cpu", "reference")),
    }
    alone = sum(entry["stage"] == "attention" for entry in found["checks"])
    assert len(found["checks"]) == 2 * selfcheck.count(quick=True) - alone
    assert all(entry["right"] is True and entry["problem"] is None for entry in found["checks"])
    assert f"All {len(found['checks'])} cases are right." in done.stdout
    assert {entry["backend"] for entry in found["timings"]} == {"cpu", "reference"}
    assert all(entry["seconds"]["median"] > 0 and entry["predicted"] is None for entry in found["timings"])
    machine = found["machine"]
    assert machine["device"] == "cpu" and machine["versions"]["torch"] and machine["threads"] >= 1
    assert "No kernel serves" not in done.stdout
    assert "predicted, not timed" in done.stdout and "median (p10 to p90)" in done.stdout


def test_a_wrong_backend_ends_with_1_and_names_the_case(
    carve: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_extension()
    honest = cpu_capture.forward

    def forward(
        query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, options: CaptureOptions, **outputs: Any
    ) -> Any:
        found = honest(query, key, tokens, options, **outputs)
        if options.window is not None:
            found.maps[..., 0] *= 1.01
        return found

    monkeypatch.setattr(cpu_capture, "forward", forward)
    done = carve("check", "--device", "cpu", "--quick", "-o", tmp_path / "check.json")
    assert done.exit_code == 1
    wrong = [entry for entry in report_of(tmp_path / "check.json")["checks"] if not entry["right"]]
    assert [entry["case"] for entry in wrong] == [
        "sinks, softcap, window, float32", "sinks, softcap, window, bfloat16",
    ]  # fmt: skip
    assert "wrong: capture, backend cpu, sinks, softcap, window, float32: maps: relative error 1.0e-02" in done.stdout
    assert "2 of 93 cases are wrong." in done.stdout


def test_an_unavailable_backend_is_reported(carve: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "the extension _C.abi3.so is not built; build it")
    done = carve("check", "--device", "cpu", "--quick", "-o", tmp_path / "check.json")
    assert done.exit_code == 0, done.output
    assert "is not built; build it" in " ".join(done.stdout.replace("│", " ").split())
    assert "No kernel serves this device: only the reference was checked." in done.stdout
    found = report_of(tmp_path / "check.json")
    assert {entry["backend"] for entry in found["checks"]} == {"reference"}
    cells = [cell for cell in found["backends"] if cell["backend"] == "cpu" and cell["stage"] != "attention"]
    assert [cell["unavailable"] for cell in cells] == [cpu.unavailable()] * len(STAGES)


@pytest.mark.parametrize("words", [["--device", "cuda"], ["--device", "cuda:99"], ["--device", "nowhere"]])
def test_an_unknown_device_is_one_line(carve: Invoke, tmp_path: Path, words: list[str]) -> None:
    if torch.cuda.is_available() and words[1] == "cuda":
        pytest.skip("there is a GPU")
    done = carve("check", "-o", tmp_path / "check.json", *words)
    assert done.exit_code == 2
    assert f"device: '{words[1]}' cannot be used here" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not isinstance(done.exception, AssertionError)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("path", ["missing/check.json", "file/check.json"])
def test_an_output_without_a_folder_is_refused_before_the_work(
    carve: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(selfcheck, "examine", lambda *_args, **_options: pytest.fail("worked before it checked"))
    done = carve("check", "--device", "cpu", "--output", tmp_path / path)
    assert done.exit_code == 2
    assert "is not a folder; choose another --output" in done.stderr
    assert list(content(tmp_path)) == ["file"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError("full"), 1)])
def test_an_interrupted_check_writes_nothing(
    carve: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def examine(*_args: object, **_options: object) -> None:
        raise error

    before = '{"format": "carve_kernels.check/1"}'
    (tmp_path / "check.json").write_text(before)
    monkeypatch.setattr(selfcheck, "examine", examine)
    done = carve("check", "--device", "cpu", "-o", tmp_path / "check.json")
    assert done.exit_code == code
    assert content(tmp_path) == {"check.json": before.encode()}


def test_help_loads_no_torch() -> None:
    code = "import sys, carve_kernels.cli; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.gpu
def test_every_kernel_of_a_gpu(carve: Invoke, tmp_path: Path) -> None:
    done = carve("check", "--device", "cuda", "--quick", "-o", tmp_path / "check.json")
    assert done.exit_code == 0, done.output
    found = report_of(tmp_path / "check.json")
    assert found["machine"]["device"].startswith("cuda") and found["timings"]
