"""carve-kernels demo: with a tiny stand-in in this process, and with the embedded model in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from carve_kernels import AttentionMaps, models
from carve_kernels.cli.report import FILES
from carve_kernels.models.scenes import draw_scene
from tests.cli.conftest import Invoke, content
from tests.support import tiny_models


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tiny_models.save(*tiny_models.tiny_llava(), tmp_path / "model")
    profile = {"rows": "question", "layers": [0], "steps": "t_start", "max_new_tokens": 2, "general_prompt": "describe"}
    (folder / "carve.json").write_text(json.dumps(profile))
    monkeypatch.setattr(models, "small", lambda: folder)
    return folder


def test_profile_and_paper_side_by_side(carve: Invoke, stand_in: Path, tmp_path: Path) -> None:
    done = carve("demo", "-o", tmp_path / "out", "--scene", 3, "--level", 2)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out"
    assert sorted(content(folder)) == sorted(FILES)
    record = json.loads((folder / "result.json").read_text())
    drawn = draw_scene(3, 2, split="test")
    assert (record["question"], record["truth"]) == (drawn.question, drawn.answer)
    assert record["scene"]["box"] == list(drawn.box)
    profile, paper = record["presets"]["profile"], record["presets"]["paper"]
    assert profile["layers"] == [0]
    assert paper["layers"] == [3]
    assert paper["preset"] == {"preset": "paper", "max_new_tokens": 2, "general_prompt": "describe"}
    assert profile["answer"] == paper["answer"]
    assert profile["right"] == (profile["answer"].lower() == drawn.answer)
    assert AttentionMaps.load(folder / "maps.safetensors").layers == (0,)
    assert Image.open(folder / "panel.png").height > 2 * 320
    assert drawn.answer in done.stdout


def test_a_scene_out_of_range_is_refused(carve: Invoke, tmp_path: Path) -> None:
    for words in (("--level", 5), ("--scene", -1)):
        assert carve("demo", "-o", tmp_path / "out", *words).exit_code == 2
    assert content(tmp_path) == {}


def test_an_output_that_cannot_be_written(carve: Invoke, stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = carve("demo", "-o", tmp_path / "file")
    assert done.exit_code == 2
    assert "file is not a folder" in done.stderr


def test_the_embedded_model(tmp_path: Path) -> None:
    # The demo needs no torchvision, and one that does not fit this torch would break it.
    code = "import runpy, sys; sys.modules['torchvision'] = None; runpy.run_module('carve_kernels', None, '__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "-o", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(content(tmp_path)) == sorted(f"demo/{name}" for name in FILES)
    record = json.loads((tmp_path / "demo/result.json").read_text())
    assert not record["presets"]["profile"]["right"]
    assert record["presets"]["profile"]["refined_right"]
    assert record["presets"]["profile"]["views"][0]["grid"] == [12, 12]
    assert Image.open(tmp_path / "demo/saliency.png").size == (384, 384)
