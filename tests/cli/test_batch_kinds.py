"""carve-kernels batch: questions about one image, several images and videos in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from carve_kernels.cli import video
from carve_kernels.cli.report import files_of
from tests.cli.conftest import QUESTION, QUICK, Invoke, content, records, table, written
from tests.hf.test_videos import write
from tests.support import tiny_models
from tests.support.processors.kinds import pair


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes images and videos."""
    return tiny_models.save(*pair("qwen2_vl"), tmp_path_factory.mktemp("qwen2_vl"))


def test_images_and_videos_in_one_file(carve: Invoke, both: Path, folder: Path) -> None:
    write(folder / "clip.mp4", size=(128, 96))
    lines: list[dict[str, Any]] = [
        {"image": ["1.png", "2.png"], "question": QUESTION, "id": "two"},
        {"video": "clip.mp4", "question": QUESTION, "id": "clip", "answer": "seven"},
        {"image": "1.png", "question": QUESTION, "id": "one"},
        {"video": "none.mp4", "question": QUESTION, "id": "lost"},
    ]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def ask(*more: str) -> Any:
        return carve("batch", "-m", both, "-i", folder / "questions.jsonl", "-o", folder / "out", *QUICK, *more)

    done = ask("--images")
    assert done.exit_code == 1 and "line 4: video: " in done.stderr and "none.mp4 is missing" in done.stderr, (
        done.output
    )
    found = records(folder)
    assert [line["id"] for line in table(folder)] == ["two", "clip", "one", "lost"]
    names = {"two": files_of(2), "clip": (*video.files(), "result.json"), "one": files_of(1), "lost": ("result.json",)}
    for name, files in names.items():
        assert sorted(content(folder / "out/results" / name)) == sorted(files)
    assert found["two"]["image_paths"] == [str(folder / "1.png"), str(folder / "2.png")]
    (of_two,), (of_clip,) = (each["presets"].values() for each in (found["two"], found["clip"]))
    assert len(of_two["images"]) == 2 and found["clip"]["video_path"] == str(folder / "clip.mp4")
    assert len(of_clip["box"]) == 6 and 0 < of_clip["kept"] <= 1 and of_clip["right"] in (True, False)
    assert table(folder)[1]["video"] == str(folder / "clip.mp4") and "image" not in table(folder)[1]

    # As `run` answers.
    more = ("-m", both, "-q", QUESTION, "-o", folder / "run", *QUICK)
    assert carve("run", "--video", folder / "clip.mp4", *more).exit_code == 0
    alone = json.loads((folder / "run/video.json").read_text())
    assert (of_clip["answer"], of_clip["box"]) == (alone["answer"], alone["box"])
    assert carve("run", "-i", folder / "1.png", "-i", folder / "2.png", *more).exit_code == 0
    (two,) = json.loads((folder / "run/result.json").read_text())["presets"].values()
    assert (two["answer"], two["box"]) == (of_two["answer"], of_two["box"])

    # What failed is tried again, the rest is not; another order of the images is another question.
    before = written(folder)
    write(folder / "none.mp4", size=(128, 96))
    lines[0]["image"].reverse()
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert ask("--images").exit_code == 0
    after = written(folder)
    assert {name for name in before if before[name] != after[name]} == {"two", "lost"}


def test_a_profile_is_of_single_images(carve: Invoke, both: Path, folder: Path) -> None:
    lines = [{"image": ["1.png", "2.png"], "question": QUESTION}, {"video": "clip.mp4", "question": QUESTION}]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    done = carve("profile", "-m", both, "-i", folder / "questions.jsonl", "-o", folder / "carve.json")
    assert done.exit_code == 2 and not (folder / "carve.json").exists()
    assert "line 1: image: expected one path, a string, in a profile, got a list of 2" in done.stderr
    assert "line 2: image: expected one path, a string, in a profile, got a video" in done.stderr
