"""carve-kernels batch: what it writes, what it does again and what not, and how it stops."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from carve_kernels.cli.report import FILES
from carve_kernels.hf.memory import Memory
from tests.cli.conftest import QUESTION, QUICK, Invoke, content
from tests.hf import tiny

Ask = Callable[..., Result]

LINES = [
    {"image": "1.png", "question": QUESTION, "answer": "seven"},
    {"image": "2.png", "question": "where is the square", "id": "second"},
    {"image": "1.png", "question": "what is the colour", "id": "a/b"},
]
NAMES = ["1", "second", "a%2Fb"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, size in ((1, (160, 96)), (2, (96, 120))):
        tiny.picture(*size, seed).save(tmp_path / f"{seed}.png")
    return tmp_path


@pytest.fixture
def ask(carve: Invoke, checkpoint: Path, folder: Path) -> Ask:
    """`batch` over these lines into `out`; what a test gives comes after good arguments and wins."""

    def run(lines: list[Any], *more: object) -> Result:
        path = folder / "questions.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return carve("batch", "-m", checkpoint, "-i", path, "-o", folder / "out", *QUICK, *more)

    return run


def records(folder: Path) -> dict[str, Any]:
    found = (folder / "out/results").glob("*/result.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files the records are and when they were written."""
    facts = {path.parent.name: path.stat() for path in (folder / "out/results").glob("*/result.json")}
    return {name: (each.st_ino, each.st_mtime_ns) for name, each in facts.items()}


def table(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]


def test_writes_a_record_for_each_and_tables_of_all(ask: Ask, folder: Path, run: Invoke) -> None:
    done = ask(LINES)
    assert done.exit_code == 0, done.output
    assert sorted(content(folder / "out")) == sorted(
        [*(f"results/{name}/result.json" for name in NAMES), "results.jsonl", "summary.json"]
    )
    assert done.stderr == "" and "3 of 3 questions answered, 0 of them before this run" in done.stdout

    found = records(folder)
    assert found["a%2Fb"]["id"] == "a/b" and found["1"]["truth"] == "seven" and found["second"]["truth"] is None
    assert run("-i", folder / "1.png").exit_code == 0
    alone = json.loads((folder / "out/result.json").read_text())
    (mine,), (theirs,) = (each["presets"].values() for each in (found["1"], alone))
    for key in ("answer", "answer_ids", "refined_ids", "layers", "views", "steps", "preset"):
        assert mine[key] == theirs[key]
    assert mine["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)

    lines = table(folder)
    assert [line["id"] for line in lines] == ["1", "second", "a/b"] and [line["line"] for line in lines] == [1, 2, 3]
    assert [line["answer"] for line in lines] == [
        next(iter(found[name]["presets"].values()))["answer"] for name in NAMES
    ]
    assert [line["right"] for line in lines] == [mine["right"], None, None] and mine["right"] in (True, False)
    summary = json.loads((folder / "out/summary.json").read_text())
    assert (summary["questions"], summary["answered"], summary["failed"]) == (3, 3, 0)
    assert summary["right"] == int(mine["right"]) and summary["preset"]["layers"] == [1, 2]


def test_what_is_done_is_not_done_again(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(LINES).exit_code == 0
    before = written(folder)
    (folder / "out/notes.txt").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr("carve_kernels.hf.loading.load", lambda *args, **kwargs: pytest.fail("loaded"))
        again = ask(LINES)
    assert again.exit_code == 0 and written(folder) == before, again.output
    assert "3 of them before this run" in again.stdout and (folder / "out/notes.txt").read_text() == "mine"


def change_picture(folder: Path) -> None:
    tiny.picture(96, 120, 5).save(folder / "2.png")


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"lines": [{**LINES[0], "question": "hello"}, *LINES[1:]]}, {"1"}),
        ({"lines": [LINES[0], {**LINES[1], "prompt": "<image> where"}, LINES[2]]}, {"second"}),
        ({"lines": [{**LINES[0], "answer": "eight"}, *LINES[1:]]}, {"1"}),
        ({"lines": [*LINES, {"image": "2.png", "question": "new"}]}, {"4"}),
        ({"lines": LINES[1:]}, set()),
        ({"picture": change_picture}, {"second"}),
        ({"picture": lambda folder: (folder / "2.png").unlink()}, set()),
        ({"more": ("--keep", 0.3)}, set(NAMES)),
        ({"more": ("--attn", "eager")}, set(NAMES)),
        ({"more": ("--backend", "reference", "--tokens", 1)}, set()),
        ({"lost": "second"}, {"second"}),
        ({"damaged": "second"}, {"second"}),
    ],
)
def test_what_changed_is_done_again_and_nothing_else(
    ask: Ask, folder: Path, change: dict[str, Any], redone: set[str]
) -> None:
    assert ask(LINES).exit_code == 0
    before = written(folder)
    if "picture" in change:
        change["picture"](folder)
    if "lost" in change:
        (folder / "out/results" / change["lost"] / "result.json").unlink()
    if "damaged" in change:
        os.truncate(folder / "out/results" / change["damaged"] / "result.json", 100)
    lines = change.get("lines", LINES)
    done = ask(lines, *change.get("more", ()))
    assert done.exit_code == 0, done.output
    after = written(folder)
    assert {name for name in after if after[name] != before.get(name)} == redone
    assert len(table(folder)) == len(lines)


def test_another_checkpoint_answers_again(ask: Ask, folder: Path) -> None:
    other = tiny.save(*tiny.tiny_llava(seed=3), folder / "model")
    assert ask(LINES[:2]).exit_code == 0
    before = written(folder)
    assert ask(LINES[:2], "-m", other).exit_code == 0
    assert not set(before.values()) & set(written(folder).values())


def test_pictures_on_demand(ask: Ask, folder: Path) -> None:
    assert ask(LINES[:1]).exit_code == 0
    assert ask(LINES[:1], "--pictures").exit_code == 0
    assert sorted(content(folder / "out/results/1")) == sorted(FILES)
    before = written(folder)
    assert ask(LINES[:1]).exit_code == 0 and written(folder) == before
    (folder / "out/results/1/panel.png").unlink()
    assert ask(LINES[:1], "--pictures").exit_code == 0
    assert sorted(content(folder / "out/results/1")) == sorted(FILES)
    # Pictures of one answer do not stay beside the record of another.
    assert ask([{**LINES[0], "question": "hello"}]).exit_code == 0
    assert list(content(folder / "out/results/1")) == ["result.json"]


def test_bad_pictures_are_records_and_are_tried_again(ask: Ask, folder: Path) -> None:
    (folder / "broken.png").write_text("no picture")
    lines = [
        LINES[0],
        {"image": "missing.png", "question": "what", "id": "m"},
        LINES[1],
        {"image": "broken.png", "question": "what", "id": "b"},
        {"image": "1.png", "question": "what <image> is it", "id": "t"},
    ]
    done = ask(lines)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: 3 of 5 questions failed: line 2: image: ") and "line 5: text: " in done.stderr
    assert "2 of 5 questions answered" in done.stdout
    found = records(folder)
    assert found["m"]["error"]["type"] == "ValueError" and "is missing" in found["m"]["error"]["message"]
    assert "cannot be read as an image" in found["b"]["error"]["message"] and found["1"]["error"] is None
    assert [line["error"] is None for line in table(folder)] == [True, False, True, False, False]
    assert "answer" not in table(folder)[1]

    before = written(folder)
    tiny.picture(60, 60, 4).save(folder / "missing.png")
    tiny.picture(60, 60, 4).save(folder / "broken.png")
    done = ask(lines[:4])
    assert done.exit_code == 0, done.output
    after = written(folder)
    assert {name for name in before if after[name] != before[name]} == {"m", "b"}
    assert all(line["error"] is None for line in table(folder))


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        ([LINES[0], "{", "{}"], (), "line 2: Expecting"),
        ([LINES[1], LINES[1]], (), "line 2: id: 'second' stands on line 1 already"),
        ([], (), "holds no questions"),
        (LINES, ("--layers", "two"), "layers: expected 20-25"),
        (LINES, ("--tokens", "0"), "tokens: expected an integer of at least 1"),
        (LINES, ("--max-image-pixels", "0"), "max_image_pixels: expected an integer of at least 1"),
        (LINES, ("--dtype", "float8"), "dtype: expected one of"),
        (LINES, ("--backend", "nope"), "backend: expected one of 'auto', 'reference'"),
        (LINES, ("--memory", ""), "memory: expected a string with at least one visible character"),
        (LINES, ("-i", "missing.jsonl"), "missing.jsonl cannot be read"),
        (LINES, ("-m", "missing"), "missing is missing"),
        (LINES, ("-o", "out/deep", "-m", "missing"), "missing is missing"),
        (LINES, ("--device", "nowhere"), "device: 'nowhere' cannot be used here"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    ask: Ask,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[Any],
    more: tuple[Any, ...],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    done = ask(lines, *more)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (folder / "out").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["1.png", "2.png", "questions.jsonl"]


def test_an_output_that_cannot_be_written(ask: Ask, folder: Path) -> None:
    (folder / "file").write_text("")
    for place in ("file", "file/deep"):
        done = ask(LINES, "-o", folder / place)
        assert done.exit_code == 1 and "output: cannot write into" in done.stderr
    done = ask(LINES, "--memory", folder / "file")
    assert done.exit_code == 1 and done.stderr.count("\n") == 1


def test_two_runs_do_not_share_a_folder(ask: Ask, folder: Path) -> None:
    (folder / "out").mkdir()
    held = os.open(folder / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = ask(LINES)
    assert done.exit_code == 1 and "another run is at work in" in done.stderr
    assert records(folder) == {}
    os.close(held)
    assert ask(LINES).exit_code == 0


@pytest.mark.parametrize("place", ["cli.store.Store.write", "hf.engine.CarveEngine.answer", "cli.report.write_record"])
def test_ctrl_c_keeps_what_is_done_and_leaves_nothing_half_written(
    ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    import carve_kernels.cli.report
    import carve_kernels.cli.store
    import carve_kernels.hf.engine

    owner: Any = carve_kernels
    *way, name = place.split(".")
    for part in way:
        owner = getattr(owner, part)
    work, calls = getattr(owner, name), []

    def interrupt(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupt)
        done = ask(LINES, "--tokens", 1)
    assert done.exit_code == 130, done.output
    assert done.stderr.startswith("error: interrupted; 1 of 3 questions are done and stay in ")
    assert list(content(folder / "out")) == ["results/1/result.json"]
    before = written(folder)
    assert ask(LINES).exit_code == 0
    assert written(folder)["1"] == before["1"] and len(table(folder)) == 3


def test_a_disk_that_fills_up(ask: Ask, folder: Path, checkpoint: Path) -> None:
    """No file may be larger than 400 kB: the second answer, of a larger picture, cannot be written."""
    tiny.picture(400, 300, 2).save(folder / "2.png")
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    program = """
import resource, tests.hf.tiny, torch
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
from carve_kernels.cli import app
app()
"""
    words = ["batch", "-m", checkpoint, "-i", path, "-o", folder / "out", *QUICK, "--pictures", "--tokens", 1]
    run = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 1, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in line and "1 of 3 questions are done and stay in" in line and "run it again" in line
    assert sorted(content(folder / "out")) == sorted(f"results/1/{name}" for name in FILES)
    before = written(folder)
    assert ask(LINES, "--pictures").exit_code == 0
    assert written(folder)["1"] == before["1"] and len(table(folder)) == 3


def test_a_memory_serves_later_runs(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    keep = Memory.keep_maps
    monkeypatch.setattr(Memory, "keep_maps", lambda self, key, maps: kept.append(key) or keep(self, key, maps))
    assert ask(LINES, "--memory", folder / "maps").exit_code == 0
    assert len(kept) == len(set(map(str, kept))) == len(list((folder / "maps").iterdir())) == 2
    others = [{**line, "question": f"{line['question']} now"} for line in LINES]
    assert ask(others, "--memory", folder / "maps").exit_code == 0
    assert len(kept) == 2 and len(table(folder)) == 3


def test_the_bar_counts_and_names_the_rate(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    done = ask(LINES, "--tokens", 1)
    assert done.exit_code == 0
    for part in ("0/3", "3/3", "questions", "left", "/s"):
        assert part in done.stderr
