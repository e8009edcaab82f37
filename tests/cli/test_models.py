"""--model in every command that has it: a directory, small, an id of the local hub cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from carve_kernels.models import small
from carve_kernels.models.scenes import draw_scene
from tests.cli.conftest import LINES, QUESTION, QUICK, Ask, Invoke, content, written
from tests.support.hub import put

REPO = "Org/Tiny"


@pytest.fixture
def snapshot(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return put(checkpoint, tmp_path / "hub", REPO)


def test_run_by_an_id(run: Invoke, snapshot: Path, tmp_path: Path) -> None:
    assert run().exit_code == 0
    expected = json.loads((tmp_path / "out/result.json").read_text())
    done = run("--model", REPO)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert found["model"]["directory"] == str(snapshot)
    assert [each["answer_ids"] for each in found["presets"].values()] == [
        each["answer_ids"] for each in expected["presets"].values()
    ]


def test_run_small_wherever_it_is_called(
    carve: Invoke, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "small")
    scene = draw_scene(seed=18, level=4, split="test")
    scene.image.save("scene.png")
    words = ("run", "-i", "scene.png", "-q", scene.question, "--max-new-tokens", 2)
    for name, folder in (("small", small()), ("./small", tmp_path / "small")):
        done = carve(*words, "--model", name)
        assert done.exit_code == 0, done.output
        assert Path(json.loads(Path("out/run/result.json").read_text())["model"]["directory"]) == folder


def test_batch_by_an_id_goes_on_where_the_directory_stopped(ask: Ask, snapshot: Path, folder: Path) -> None:
    """It is the same checkpoint, by its path and by its id."""
    assert ask(LINES[:2], "--model", snapshot).exit_code == 0
    before = written(folder)
    done = ask(LINES, "--model", REPO)
    assert done.exit_code == 0, done.output
    after = written(folder)
    assert "2 of them before this run" in done.stdout and {name: after[name] for name in before} == before


def test_profile_by_an_id(carve: Invoke, snapshot: Path, folder: Path) -> None:
    lines = [{"image": f"{seed}.png", "question": QUESTION} for seed in (1, 2)]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    words = ("--rows", "last", "--steps", "t_start", "--max-new-tokens", 1, "-o", folder / "carve.json")
    done = carve("profile", "-m", REPO, "-i", folder / "questions.jsonl", *words)
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "carve.json").read_text())["evidence"]["model"]["directory"] == str(snapshot)


@pytest.mark.parametrize("command", ["run", "batch", "profile"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Org/Other", "--model: 'Org/Other' is not a directory, and the local hub cache has no main revision"),
        (REPO, "download it with: hf download Org/Tiny"),
        ("./Org/Tiny", "--model: expected a checkpoint directory, ./Org/Tiny is missing"),
        ("", "--model: expected a string"),
    ],
)
def test_an_unknown_name_is_one_line(
    carve: Invoke, snapshot: Path, folder: Path, image_file: Path, command: str, name: str, message: str
) -> None:
    (snapshot / "model.safetensors").unlink()
    (folder / "questions.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    words = ("-i", image_file, "-q", QUESTION) if command == "run" else ("-i", folder / "questions.jsonl")
    before = content(folder)
    done = carve(command, "--model", name, *words, "-o", folder / "out", *(QUICK[:2]))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: --model: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert content(folder) == before


def test_an_argument_is_named_as_it_was_typed(run: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    done = run("--max-image-pixels", 0)
    assert done.stderr == "error: --max-image-pixels: expected an integer of at least 1, got int 0\n"
    # A value in a file was not typed, but the folder of the file was.
    Path(shutil.copytree(checkpoint, tmp_path / "copy"), "carve.json").write_text('{"keep": 7}')
    done = run("--model", tmp_path / "copy")
    assert done.exit_code == 2 and done.stderr.startswith("error: --model: "), done.output
    assert "carve.json: keep: " in done.stderr
