"""carve-kernels profile: the file that it writes, its readers, and errors before and during the work."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from carve_kernels import Preset
from carve_kernels.cli.questions import read
from tests.cli.conftest import QUESTION, Invoke, content
from tests.support import tiny_models

LINES = [
    {"image": "a.png", "question": QUESTION, "box": [70, 30, 110, 70]},
    {"image": "a.png", "question": "where is the square", "paraphrases": ["find the square"]},
    {"image": "b.png", "question": "hello", "boxes": [[0, 0, 40, 40], [60, 60, 90, 90]]},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    for number, name in enumerate("ab"):
        tiny_models.make_image(160, 96, number).save(tmp_path / f"{name}.png")
    return written(tmp_path, LINES)


@pytest.fixture
def profile(carve: Invoke, checkpoint: Path, questions: Path, tmp_path: Path) -> Invoke:
    """`profile` with good arguments and tmp_path/out/carve.json; arguments of a test come after them and win."""
    words = ("profile", "-m", checkpoint, "-i", questions, "-o", tmp_path / "out/carve.json", "--max-new-tokens", 2)
    return lambda *more: carve(*words, *more)


def written(folder: Path, lines: list[Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_writes_a_preset_with_its_evidence(profile: Invoke, tmp_path: Path) -> None:
    before = content(tmp_path)
    done = profile()
    assert done.exit_code == 0, done.output
    assert set(content(tmp_path)) - set(before) == {"out/carve.json"}
    values = json.loads((tmp_path / "out/carve.json").read_text())
    evidence = values["evidence"]
    assert (evidence["questions"], evidence["images"], evidence["boxes"]) == (3, 2, 2)
    assert evidence["model"]["type"] == "llava" and "torch" in evidence["versions"]
    chosen = Preset.from_dict(values)
    assert list(chosen.layers) == [evidence["pick"]["layer"]] and chosen.max_new_tokens == 2
    # Four layers; the last token at three steps, the question, and four words one by one.
    assert len(evidence["cells"]) == 4 * (3 + 1 + 4)
    assert "pick" in done.stdout and "the boxes (2) did not affect the choice" in done.stdout and done.stderr == ""


def test_run_reads_what_was_written(profile: Invoke, run: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    assert profile("--rows", "question", "--rows", "-2", "--steps", "t_start").exit_code == 0
    path = tmp_path / "out/carve.json"
    expected = Preset.from_dict(json.loads(path.read_text())).to_dict()
    assert expected.get("rows") in ("question", (-2,)) and expected["steps"] == "t_start"
    assert run("--preset", path, "--layers", expected["layers"][0], "-o", tmp_path / "by-file").exit_code == 0
    folder = tiny_models.save(*tiny_models.tiny_llava(), tmp_path / "model")
    path.rename(folder / "carve.json")
    assert run("-m", folder, "--layers", expected["layers"][0], "-o", tmp_path / "by-folder").exit_code == 0
    for name, preset in (("by-file", "carve"), ("by-folder", "profile")):
        (found,) = json.loads((tmp_path / name / "result.json").read_text())["presets"].items()
        assert found[0] == preset
        assert Preset.from_dict(found[1]["preset"]) == Preset.from_dict(expected)


def test_without_boxes_there_is_no_pointing(profile: Invoke, tmp_path: Path) -> None:
    written(tmp_path, [{key: line[key] for key in ("image", "question")} for line in LINES])
    done = profile("--steps", "t_start")
    assert done.exit_code == 0, done.output
    assert "by contrast" not in done.stdout and "the boxes" not in done.stdout
    assert "pointing" not in json.loads((tmp_path / "out/carve.json").read_text())["evidence"]["pick"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 4: "),
        ({"image": "missing.png", "question": "x"}, "line 4: image: "),
        ({"image": "text.png", "question": "x"}, "line 4: image: "),
        ({"image": "a.png", "question": " "}, "line 4: question: "),
        ({"image": "a.png", "question": "x", "paraphrases": "y"}, "line 4: paraphrases: expected a list"),
        ({"image": "a.png", "question": "x", "paraphrases": [7]}, "line 4: paraphrases[0]: expected a string"),
        ({"image": "a.png", "question": "x", "box": [1, 2, 3]}, "line 4: boxes[0]: expected (x0, y0, x1, y1)"),
        ({"image": "a.png", "question": "x", "box": [1, 2, 1, 4]}, "line 4: boxes[0]: expected (x0, y0, x1, y1)"),
        ({"image": "a.png", "question": "x", "boxes": 3}, "line 4: boxes: expected a list"),
        ({"image": "a.png", "question": "x", "box": [0, 0, 1, 1], "boxes": []}, "line 4: box: expected box or boxes"),
        ({"image": "a.png", "question": "x", "prompt": "y"}, "line 4: prompt: expected none"),
    ],
)
def test_bad_lines_are_named_before_the_work(
    profile: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Any, message: str
) -> None:
    monkeypatch.setattr("carve_kernels.hf.loading.load", lambda *args, **kwargs: pytest.fail("loaded"))
    (tmp_path / "text.png").write_text("not an image")
    path = written(tmp_path, [*LINES, line])
    before = content(tmp_path)
    done = profile("-i", path)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-i", "missing.jsonl"], 2, "missing.jsonl cannot be read"),
        (["-m", "missing"], 2, "--model: 'missing' is not a directory"),
        (["--rows", "first"], 2, "rows: expected last, 4, question"),
        (["--rows", "-90"], 2, "rows: expected "),
        (["--rows", "question", "--steps", "t_end"], 2, "rows: expected 'last' among the rows for steps"),
        (["--steps", "t_middle"], 2, "--steps: expected one of 't_start'"),
        (["--max-new-tokens", "0"], 2, "--max-new-tokens: "),
        (["--preset", "mine"], 2, "preset: expected one of 'paper', 'release'"),
        (["--dtype", "float8"], 2, "--dtype: "),
        (["--max-image-pixels", "100"], 2, "line 1: image: "),
        (["-o", "a.png/carve.json"], 2, "a.png is not a folder"),
        (["-o", "folder"], 2, "folder is a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    profile: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    before = content(tmp_path)
    done = profile(*words)
    assert done.exit_code == code, done.output
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert content(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "place", ["carve_kernels.hf.profile.candidate_maps.CandidateReader.read", "json.dumps", "os.replace"]
)
def test_an_interruption_leaves_what_was_there(
    profile: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    assert profile("--steps", "t_start", "--rows", "last").exit_code == 0
    before = content(tmp_path)

    def interrupt(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        done = profile("--steps", "t_start")
    assert done.exit_code == 130
    assert done.stderr == "error: interrupted; nothing was written\n"
    assert content(tmp_path) == before
    assert profile("--steps", "t_start").exit_code == 0
    assert "evidence" in json.loads((tmp_path / "out/carve.json").read_text())


def test_the_example_draws_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).resolve().parents[2] / "examples/small_vlm/questions.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--output", str(tmp_path / "drawn"), "--scenes", "1"])
    runpy.run_path(str(script), run_name="__main__")
    lines = read(tmp_path / "drawn/questions.jsonl")
    assert len(lines) == 4 * 2 and len({line.image for line in lines}) == 4
    assert all(line.image.is_file() and len(line.extra["box"]) == 4 for line in lines)
    assert all(lines[index].text != lines[index + 1].text for index in range(0, 8, 2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "a.png", "question": "what <image> is it"}, "line 4: question: contains the image token"),
        (
            {"image": "a.png", "question": "x", "paraphrases": ["y", "<image>"]},
            "line 4: question: contains the image token",
        ),
        ({"image": "x" * 300, "question": "x"}, "line 4: image: "),
    ],
)
def test_lines_that_only_the_processor_refuses_are_named_before_the_model_runs(
    profile: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Any, message: str
) -> None:
    monkeypatch.setattr(
        "carve_kernels.hf.profile.candidate_maps.CandidateReader.read", lambda *args: pytest.fail("ran the model")
    )
    done = profile("-i", written(tmp_path, [*LINES, line]))
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output
    assert not (tmp_path / "out").exists()


def test_nothing_given_as_null_is_nothing(profile: Invoke, tmp_path: Path) -> None:
    empty = {"box": None, "boxes": None, "paraphrases": None}
    done = profile("-i", written(tmp_path, [{**empty, **line} for line in LINES]))
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/carve.json").read_text())["evidence"]["boxes"] == 2


def test_help_describes_the_lines(carve: Invoke) -> None:
    printed = " ".join(carve("profile", "--help").stdout.replace("│", " ").split())
    assert '"paraphrases": [text, ...]' in printed and '"box": [x0, y0, x1, y1]' in printed
