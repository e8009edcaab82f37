"""carve-kernels batch: what it writes, and which questions it answers again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from carve_kernels.cli.report import FILES
from carve_kernels.hf.engine.cache import Memory
from carve_kernels.models.scenes import draw_scene
from tests.cli.conftest import LINES, Ask, Invoke, content, records, table, written
from tests.support import tiny_models

NAMES = ["1", "second", "a%2Fb"]


def test_writes_a_record_for_each_and_tables_of_all(ask: Ask, folder: Path, run: Invoke) -> None:
    done = ask(LINES)
    assert done.exit_code == 0, done.output
    assert sorted(content(folder / "out")) == sorted(
        [*(f"results/{name}/result.json" for name in NAMES), "results.jsonl", "summary.json"]
    )
    assert done.stderr == "" and "3 of 3 questions answered, 0 of them before this run" in done.stdout
    assert "; right of 1: plain " in done.stdout and " s, 3 new answers: " in done.stdout

    found = records(folder)
    assert found["1"]["image_path"] == str(folder / "1.png")
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


def change_image(folder: Path) -> None:
    tiny_models.make_image(96, 120, 5).save(folder / "2.png")


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"lines": [{**LINES[0], "question": "hello"}, *LINES[1:]]}, {"1"}),
        ({"lines": [LINES[0], {**LINES[1], "prompt": "<image> where"}, LINES[2]]}, {"second"}),
        ({"lines": [{**LINES[0], "answer": "eight"}, *LINES[1:]]}, {"1"}),
        ({"lines": [*LINES, {"image": "2.png", "question": "new"}]}, {"4"}),
        ({"lines": LINES[1:]}, set()),
        ({"change": change_image}, {"second"}),
        ({"change": lambda folder: (folder / "2.png").unlink()}, set()),
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
    if "change" in change:
        change["change"](folder)
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
    other = tiny_models.save(*tiny_models.tiny_llava(seed=3), folder / "model")
    assert ask(LINES[:2]).exit_code == 0
    before = written(folder)
    assert ask(LINES[:2], "-m", other).exit_code == 0
    assert not set(before.values()) & set(written(folder).values())


def test_images_on_demand(ask: Ask, folder: Path) -> None:
    assert ask(LINES[:1]).exit_code == 0
    assert ask(LINES[:1], "--images").exit_code == 0
    assert sorted(content(folder / "out/results/1")) == sorted(FILES)
    before = written(folder)
    assert ask(LINES[:1]).exit_code == 0 and written(folder) == before
    (folder / "out/results/1/panel.png").unlink()
    assert ask(LINES[:1], "--images").exit_code == 0
    assert sorted(content(folder / "out/results/1")) == sorted(FILES)
    # Images of an earlier answer do not stay beside the record of this one.
    assert ask([{**LINES[0], "question": "hello"}]).exit_code == 0
    assert list(content(folder / "out/results/1")) == ["result.json"]


def test_bad_images_are_records_and_are_tried_again(ask: Ask, folder: Path) -> None:
    (folder / "broken.png").write_text("not an image")
    lines = [
        LINES[0],
        {"image": "missing.png", "question": "what", "id": "m"},
        LINES[1],
        {"image": "broken.png", "question": "what", "id": "b"},
        {"image": "1.png", "question": "what <image> is it", "id": "t"},
    ]
    done = ask(lines)
    assert done.exit_code == 1
    assert (
        done.stderr.startswith("error: 3 of 5 questions failed: line 2: image: ")
        and "line 5: question: " in done.stderr
    )
    assert "2 of 5 questions answered" in done.stdout and ", 2 new answers: " in done.stdout
    found = records(folder)
    assert found["m"]["error"]["type"] == "ValueError" and "is missing" in found["m"]["error"]["message"]
    assert "cannot be read as an image" in found["b"]["error"]["message"] and found["1"]["error"] is None
    assert [line["error"] is None for line in table(folder)] == [True, False, True, False, False]
    assert "answer" not in table(folder)[1]

    before = written(folder)
    tiny_models.make_image(60, 60, 4).save(folder / "missing.png")
    tiny_models.make_image(60, 60, 4).save(folder / "broken.png")
    done = ask(lines[:4])
    assert done.exit_code == 0, done.output
    after = written(folder)
    assert {name for name in before if after[name] != before[name]} == {"m", "b"}
    assert all(line["error"] is None for line in table(folder))


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


def test_the_old_name_of_images_works(ask: Ask, folder: Path) -> None:
    assert ask(LINES[:1], "--images").exit_code == 0
    assert sorted(content(folder / "out/results/1")) == sorted(FILES)


def test_too_little_memory_for_one_image_is_its_error(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from carve_kernels.hf.engine import requests

    open_image = requests.open_image

    def full(image: Any, limit: int) -> Any:
        if Path(image).name == "2.png":
            raise MemoryError
        return open_image(image, limit)

    monkeypatch.setattr(requests, "open_image", full)
    done = ask(LINES)
    assert done.exit_code == 1 and "line 2: MemoryError" in done.stderr and done.stderr.count("\n") == 1
    assert records(folder)["second"]["error"] == {"type": "MemoryError", "message": "MemoryError"}


def test_without_a_model_the_embedded_one_answers(carve: Invoke, folder: Path) -> None:
    scene = draw_scene(seed=3, level=1, split="test")
    scene.image.save(folder / "scene.png")
    path = folder / "questions.jsonl"
    path.write_text(json.dumps({"image": "scene.png", "question": scene.question, "answer": scene.answer}))
    done = carve("batch", "--input", path, "--output", folder / "out")
    assert done.exit_code == 0, done.output
    assert "no --model: the embedded model answers" in done.stderr and done.stderr.count("\n") == 1
    assert table(folder)[0]["answer"] in scene.answer + scene.general
