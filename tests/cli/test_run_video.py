"""carve-kernels run --video on a tiny checkpoint: its files and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

import carve_kernels
from carve_kernels import animation
from carve_kernels.cli import video
from tests.cli.conftest import QUESTION, QUICK, Invoke, content
from tests.hf.test_videos import write
from tests.support import tiny_models
from tests.support.processors.kinds import pair


@pytest.fixture(scope="module")
def video_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(*pair("qwen2_vl"), tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture
def ask(carve: Invoke, video_checkpoint: Path, tmp_path: Path) -> Invoke:
    clip = write(tmp_path / "clip.mp4", size=(128, 96))
    words = ("run", "-m", video_checkpoint, "-q", QUESTION, "-o", tmp_path / "out", "--keep", "0.1", *QUICK)
    return lambda *more: carve(*words, *(() if "--video" in more else ("--video", clip)), *more)


def test_writes_every_file(ask: Invoke, tmp_path: Path) -> None:
    done = ask("--max-frames", 5)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out"
    assert sorted(content(folder)) == sorted(video.files())

    record: dict[str, Any] = json.loads((folder / video.RECORD).read_text())
    assert record["question"] == QUESTION and record["model"]["type"] == "qwen2_vl"
    assert (record["video"]["frames"], record["video"]["width"], record["video"]["height"]) == (5, 128, 96)
    assert record["video"]["seconds"] == pytest.approx([0.2, 0.6, 1.0, 1.4, 1.8], abs=2e-3)
    x0, y0, f0, x1, y1, f1 = record["box"]
    assert (record["refined"]["width"], record["refined"]["height"]) == (x1 - x0, y1 - y0)
    assert record["refined"]["frames"] >= f1 - f0 and sum(record["share"]) == pytest.approx(1)
    assert [view["frame"] for view in record["views"]] == [[0, 2], [2, 4], [4, 5]]
    assert [each["frame"] for each in record["key_frames"]] == [0, 2, 4]

    saliency = numpy.load(folder / "saliency-frames.npy")
    assert saliency.shape == (5, 96, 128) and saliency.dtype == numpy.float32 and saliency.max() > 0
    for name, frames, size in ((1, 5, (128, 96)), (2, record["refined"]["frames"], (x1 - x0, y1 - y0))):
        with Image.open(folder / video.files()[name]) as opened:
            assert opened.n_frames == frames and opened.size == size
    assert Image.open(folder / "strip.png").width == 3 * 240 + 4 * 24
    assert carve_kernels.AttentionMaps.load(folder / "maps-frames.safetensors").layout is not None
    for text in (f"question: {QUESTION}", "refined answer:", "Kept: frames", "3 key frames: 0.2 s, 1.0 s, 1.8 s"):
        assert text in done.stdout

    # A later run replaces what this one wrote, and nothing that was changed since.
    assert ask("--max-frames", 3).exit_code == 0
    (folder / video.files()[1]).write_bytes(b"mine")
    refused = ask("--max-frames", 3)
    assert refused.exit_code == 2 and "was not written by this version of carve_kernels" in refused.output
    assert (folder / video.files()[1]).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--video", "missing.mp4"), "missing.mp4 is missing"),
        (("-i", "photo.png"), "--image, --video: expected images or a video, got both"),
        (("--refine", "1"), "--refine: expected with several images alone"),
        (("--max-frames", "0"), "expected an integer of at least 1"),
        (("--fps", "0"), "expected a number above 0"),
        (("--fit", "pad"), "expected None for a video"),
    ],
)
def test_bad_options_are_named(ask: Invoke, more: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = ask(*more)
    assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "out").exists()


def test_options_of_a_video_without_one(carve: Invoke, video_checkpoint: Path, tmp_path: Path) -> None:
    words = ("run", "-m", video_checkpoint, "-q", QUESTION, "-o", tmp_path / "out")
    for more, message in (
        ((), "--image, --video: expected images or a video, got none"),
        (("-i", "photo.png", "--fps", 2), "--fps: expected with --video alone, got 2.0"),
        (("-i", "photo.png", "--max-frames", 2), "--max-frames: expected with --video alone, got 2"),
    ):
        done = carve(*words, *more)
        assert done.exit_code == 2 and message in done.output, done.output


def test_a_model_that_takes_images_only_is_named(ask: Invoke, tmp_path: Path) -> None:
    done = ask("-m", "small", "--layers", "1")
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    assert "error: --video: expected a model that takes videos; llava takes images only" in done.stderr


def test_the_strip_labels_the_answers_and_numbers_frames_as_the_record(
    ask: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[str] = []

    def caught(*_args: Any, caption: str, **options: Any) -> Any:
        captions.append(caption)
        return animation.strip(*_args, caption=caption, **options)

    monkeypatch.setattr(video, "strip", caught)
    done = ask("--max-frames", 5)
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads((tmp_path / "out" / video.RECORD).read_text())
    _, _, f0, _, _, f1 = record["box"]
    kept = f"Kept: frames {f0} to {f1 - 1} of 5, numbered from 0" if f1 > f0 + 1 else f"Kept: frame {f0} of 5, "
    assert kept in done.stdout and kept in captions[0]
    plain, refined, *_ = captions[0].splitlines()
    assert plain.startswith("Plain answer: ") and refined.startswith("Refined answer: ")


def test_a_fit_is_refused_before_the_model_is_loaded(ask: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carve_kernels.hf.loading.load", pytest.fail)
    done = ask("--fit", "pad")
    assert done.exit_code == 2 and "--fit: expected None for a video, got 'pad'" in done.output, done.output


def test_results_about_images_in_the_same_folder_stay(
    ask: Invoke, carve: Invoke, video_checkpoint: Path, image_file: Path, tmp_path: Path
) -> None:
    words = ("run", "-m", video_checkpoint, "-q", QUESTION, "-o", tmp_path / "out", *QUICK)
    assert carve(*words, "-i", image_file).exit_code == 0
    before = content(tmp_path / "out")
    assert ask("--max-frames", 3).exit_code == 0
    after = content(tmp_path / "out")
    assert {name: after[name] for name in before} == before and set(after) == {*before, *video.files()}
