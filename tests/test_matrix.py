"""What `make matrix` and `make newest` find, refuse and write, with a stub for Python."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import __main__ as matrix
from tests.matrix import checks, newest, table
from tests.matrix.environment import DoesNotInstall, find_python, reason_of
from tests.matrix.rows import ROWS, Row, chosen

ROW = Row("3.11-2.10", "3.11", "2.10", "5.12", "3.6")
PAGE = f"# Title\n\n{table.BEGIN}\n{table.END}\n\nAfter.\n"

# Behaves like the interpreter of an environment; FAULT selects a failure.
STUB = """#!{python}
import os, shutil, sys
from pathlib import Path
words, fault = sys.argv[1:], os.environ.get("FAULT", "")
with Path(__file__).with_name("calls").open("a") as calls:
    print(*words, file=calls)
if words[:1] == ["-c"] and "version_info" in words[1]:
    print("{version}")
elif words[:1] == ["-c"]:
    print(*["2.10.0+cpu", "5.12.1", "3.6.0"][: words[1].count("'") // 2])
elif words[:2] == ["-m", "venv"]:
    Path(words[2], "bin").mkdir(parents=True)
    shutil.copy(__file__, Path(words[2], "bin", "python"))
elif words[:3] == ["-m", "pip", "install"] and fault == "pip":
    print("Collecting torch\\nERROR: Could not find it\\nERROR: No matching distribution found for torch==2.10.*")
    sys.exit(1)
elif words[:2] == ["-m", "pytest"] and fault == "silent":
    pass
elif words[:2] == ["-m", "pytest"]:
    report = next(word for word in words if word.startswith("--junitxml=")).removeprefix("--junitxml=")
    case = '<testcase name="test_a[one]"/><testcase name="test_b[one]"/><testcase name="test_a[two]">'
    inside = "<failure/>" if fault == "zoo" and "zoo.xml" in report else "<skipped/>"
    Path(report).write_text(f"<testsuites><testsuite>{{case}}{{inside}}</testcase></testsuite></testsuites>")
    print("1 failed, 2 passed in 1.00s" if "failure" in inside else "2 passed, 1 skipped in 1.00s")
    sys.exit(1 if "failure" in inside else 0)
elif words == ["-m", "tests.backends.triton.offline"]:
    print("36 kernels with triton 3.6.0, %d at fault" % (fault == "spills"))
    sys.exit(fault == "spills")
"""


def stub(path: Path, version: str = "3.11") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB.format(python=sys.executable, version=version))
    path.chmod(0o755)
    return path


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A root with test files, a stub of Python 3.11, and a folder for temporary files."""
    root = tmp_path / "root"
    for name in ("session/test_session.py", "engine/test_engine.py", "layouts/test_zoo.py"):
        (root / "tests/hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tests/hf" / name).touch()
    (root / "build").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    environ = {"PATH": os.defpath, "PYTHON311": str(stub(tmp_path / "python3.11"))}
    return {"root": root, "logs": tmp_path / "logs", "environ": environ}


def try_row(setting: dict[str, Any], row: Row = ROW, fault: str = "") -> checks.Outcome:
    temporary = setting["logs"].parent / "temporary"
    outcome = matrix.try_row(row, **{**setting, "environ": {**setting["environ"], "FAULT": fault}})
    assert list(temporary.iterdir()) == [], "the environment is deleted after every outcome"
    return outcome


def test_a_row_that_works(setting: dict[str, Any]) -> None:
    outcome = try_row(setting)
    assert outcome.faults == [] and outcome.result == "passed"
    assert outcome.versions == {"python": "3.11", "torch": "2.10.0", "transformers": "5.12.1", "triton": "3.6.0"}
    assert outcome.cells["zoo"] == "1 of 2" and outcome.cells["sessions"] == "2 passed, 1 skipped"
    assert outcome.cells["compiled"] == "36 kernels, 0 at fault"
    log = (setting["logs"] / "3.11-2.10.log").read_text()
    for requirement in ("torch==2.10.*", "transformers==5.12.*", "--no-deps triton==3.6.*", "torchvision==0.25.*"):
        assert requirement in log
    assert "-m not gpu" in log and "test_session.py" in log and "test_engine.py" in log


def test_pips_reason_fails_a_row(setting: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    outcome = try_row(setting, fault="pip")
    reason = "Could not find it; No matching distribution found for torch==2.10.*"
    assert outcome.result == f"FAILED: does not install: {reason}"
    assert f"does not install: {reason}" in capsys.readouterr().out


def test_a_row_that_is_known_not_to_install_is_reported_and_not_a_failure(
    setting: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("3.11-2.10", "3.11", "2.10", known="no wheel for this processor")
    outcome = try_row(setting, row, fault="pip")
    assert outcome.faults == [] and outcome.result == "known: no wheel for this processor"
    assert "No matching distribution found" in capsys.readouterr().out
    # If it does install, it is tested like any other.
    assert try_row(setting, row).result == "passed"
    assert try_row(setting, row, fault="zoo").result.startswith("FAILED")


@pytest.mark.parametrize(
    ("fault", "message"),
    [("zoo", "zoo: 1 failed, 2 passed"), ("spills", "compiled: 36 kernels with triton 3.6.0, 1 at")],
)
def test_a_failure_is_named_and_the_rest_is_run(setting: dict[str, Any], fault: str, message: str) -> None:
    outcome = try_row(setting, fault=fault)
    assert len(outcome.faults) == 1 and outcome.faults[0].startswith(message)
    assert set(outcome.cells) == {"sessions", "zoo", "interpreted", "compiled"}


def test_where_no_test_ran_the_row_fails(setting: dict[str, Any]) -> None:
    outcome = try_row(setting, fault="silent")
    assert outcome.faults == [f"{name}: no output" for name in checks.TESTS]
    assert outcome.cells["zoo"] == "0 of 0" and outcome.cells["sessions"] == "0 passed"


def test_an_interpreter_is_found_on_the_path_or_under_pyenv(tmp_path: Path) -> None:
    shim = tmp_path / "shims" / "python3.12"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    environ = {"PATH": str(shim.parent), "PYENV_ROOT": str(tmp_path / "pyenv")}
    with pytest.raises(
        DoesNotInstall, match=r"no python3\.12 on the path or under pyenv; give one, make matrix PYTHON312="
    ):
        find_python("3.12", environ)
    stub(tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python3.12", "3.12")
    newer = stub(tmp_path / "pyenv" / "versions" / "3.12.10" / "bin" / "python3.12", "3.12")
    assert find_python("3.12", environ) == str(newer)
    on_path = stub(tmp_path / "bin" / "python3.12", "3.12")
    assert find_python("3.12", {**environ, "PATH": str(on_path.parent)}) == str(on_path)


def test_a_given_interpreter_is_of_the_version(tmp_path: Path) -> None:
    given = stub(tmp_path / "mine", "3.13")
    assert find_python("3.13", {"PYTHON313": str(given)}) == str(given)
    with pytest.raises(DoesNotInstall, match=r"PYTHON310: expected the command of a Python 3\.10, got"):
        find_python("3.10", {"PYTHON310": str(given)})
    with pytest.raises(DoesNotInstall, match="PYTHON310: expected"):
        find_python("3.10", {"PYTHON310": str(tmp_path / "missing")})


def test_a_reason_without_the_word_is_the_end_of_the_output() -> None:
    assert reason_of("one\ntwo\n\nthree\nfour\n") == "two three four"
    assert reason_of("") == "no reason was given"


def test_rows_are_named() -> None:
    assert [row.name for row in chosen(["3.13", "3.11-2.10"])] == ["3.11-2.10", "3.13"]
    assert chosen([]) == list(ROWS) and len(ROWS) == 6
    with pytest.raises(ValueError, match=r"ROWS: expected some of 3\.11-2\.10 .*, got 3\.9"):
        chosen(["3.9"])


def test_a_row_replaces_its_line() -> None:
    outcome = checks.Outcome({"python": "3.11", "torch": "2.10.0"}, {"zoo": "1 of 2"}, seconds=61.4)
    first = table.line(ROW, outcome, date(2026, 1, 2))
    assert first == "| 3.11-2.10 | 3.11 | 2.10.0 | - | - | 1 of 2 | - | - | - | 61 | 2026-01-02 | passed |"
    page = table.replaced(PAGE, {ROW.name: first}, "a machine")
    assert page.startswith("# Title\n") and page.endswith("After.\n") and first in page and "a machine" in page
    assert sum(table.NOT_RUN in each for each in page.splitlines()) == 5
    outcome.faults.append("zoo: 1 failed | 2\npassed")
    again = table.replaced(page, {ROW.name: table.line(ROW, outcome, date(2026, 1, 3))}, "a machine")
    assert first not in again and "| FAILED: zoo: 1 failed / 2 passed |" in again
    assert len(again.splitlines()) == len(page.splitlines())
    with pytest.raises(ValueError, match="expected the marks"):
        table.replaced("# Title\n", {}, "a machine")


@pytest.mark.parametrize(("faults", "status"), [([], 0), (["zoo: 1 failed"], 1)])
def test_a_failed_row_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], faults: list[str], status: int
) -> None:
    page = tmp_path / "matrix.md"
    page.write_text(PAGE)
    monkeypatch.setattr(matrix, "PAGE", page)
    monkeypatch.setattr(matrix, "try_row", lambda *_: checks.Outcome(faults=list(faults)))
    monkeypatch.setattr(sys, "argv", ["matrix", "3.12", "3.13"])
    assert matrix.main() == status
    message = capsys.readouterr().out
    assert message.endswith(
        "0 of 2 rows passed; failed: 3.12 3.13\n" if faults else "2 of 2 rows passed; failed: none\n"
    )
    assert list(table.lines_of(page.read_text())) == [row.name for row in ROWS]


def test_an_unknown_row_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["matrix", "2.7"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "ROWS: expected some of" in capsys.readouterr().err


def test_the_verdict_compares_the_newest_with_the_tested() -> None:
    message = newest.verdict("5.25.0", "5.12", "5.24", False)
    assert message.startswith(
        "tests/hf FAIL; transformers 5.25.0 is newer than TESTED (5.12 to 5.24); it may have renamed"
    )
    assert "may be raised" in newest.verdict("6.0.0", "5.12", "5.24", True)
    assert newest.verdict("5.24.3", "5.12", "5.24", True).endswith("is within TESTED (5.12 to 5.24)")
    assert "renamed" not in newest.verdict("5.24.3", "5.12", "5.24", False)


@pytest.mark.parametrize(("status", "message"), [(0, "tests/hf pass"), (1, "tests/hf FAIL")])
def test_the_newest_is_tested_in_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, message: str
) -> None:
    calls: list[tuple[list[str], str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, options.get("env", {}).get("PYTHONPATH", "")))
        return subprocess.CompletedProcess(command, status if "pytest" in command else 0, "5.25.0 5.12 5.24\n", "")

    (tmp_path / "newest").mkdir()
    (tmp_path / "newest" / "old").touch()
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["newest", str(tmp_path / "newest"), "-n", "2"])
    assert newest.main() == status
    assert not (tmp_path / "newest" / "old").exists()
    (install, _), (_, query_path), (zoo, _), (tests, path) = calls
    assert install[3] == "install" and {"transformers", "tokenizers", "huggingface-hub"} <= set(install)
    assert zoo[-1] == "tests/hf/layouts/test_zoo.py" and tests[-3:] == ["-n", "2", "tests/hf"]
    assert path == query_path == str(tmp_path / "newest")
    output = capsys.readouterr().out
    assert (
        output.startswith("transformers 5.25.0\n") and f"{message}; transformers 5.25.0 is newer than TESTED" in output
    )


def test_a_newest_that_does_not_install_or_import_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["newest", str(tmp_path / "newest")])
    for refusing, message in (("install", "does not install"), ("-c", "does not import")):
        monkeypatch.setattr(
            subprocess,
            "run",
            lambda command, refusing=refusing, **_: subprocess.CompletedProcess(
                command, int(refusing in command), "", "because"
            ),
        )
        assert newest.main() == 1
        assert message in capsys.readouterr().out
