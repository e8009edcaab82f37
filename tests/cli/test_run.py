"""carve-kernels run on tiny checkpoints: its files and its options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import carve_kernels
from carve_kernels.cli import report
from carve_kernels.cli.options import parse_lam, parse_layers, parse_rows
from carve_kernels.cli.report import FILES, files_of
from carve_kernels.visualize import panel
from tests.cli.conftest import QUESTION, Invoke, content
from tests.support import tiny_models


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_writes_every_file(run: Invoke, tmp_path: Path, image_file: Path) -> None:
    done = run()
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out"
    assert sorted(content(tmp_path)) == sorted(f"out/{name}" for name in FILES)

    record = result_of(folder)
    assert record["question"] == QUESTION
    assert record["truth"] is None
    assert record["image"] == {"width": 160, "height": 96}
    assert record["model"]["type"] == "llava"
    assert {"torch", "transformers", "carve_kernels", "python"} <= set(record["versions"])
    (numbers,) = record["presets"].values()
    assert numbers["layers"] == [1, 2]
    assert set(numbers["entropy"]) == set(numbers["mass"]["task"]) == {"1", "2"}
    assert all(0 < value < 1 for value in (*numbers["entropy"].values(), *numbers["mass"]["general"].values()))
    assert numbers["views"] == [{"grid": [6, 6], "box": [32.0, 0.0, 128.0, 96.0], "kind": "base"}]
    assert set(numbers["seconds"]) == {"first pass", "contrast", "regions", "zoom", "second pass"}

    saliency = numpy.load(folder / "saliency.npy")
    assert saliency.shape == (96, 160)
    assert saliency.dtype == numpy.float32
    assert numbers["saliency"]["high"] == saliency.max() > 0
    assert Image.open(folder / "saliency.png").size == Image.open(folder / "image.png").size == (160, 96)
    assert Image.open(folder / "image.png").tobytes() == Image.open(image_file).tobytes()
    refined = Image.open(folder / "refined.png")
    assert refined.size == tuple(numbers["refined"].values())
    assert Image.open(folder / "panel.png").width > 6 * 320
    maps = carve_kernels.AttentionMaps.load(folder / "maps.safetensors")
    assert maps.view().shape == (2, 2, 1, 6, 6)
    mass = maps.mass[0, :, -1, 0].tolist()
    assert list(numbers["mass"]["task"].values()) == pytest.approx(mass)
    assert numbers["answer"][:1] in done.stdout
    assert done.stderr == ""


def test_several_images(run: Invoke, tmp_path: Path, checkpoint: Path, folder: Path) -> None:
    """Files of each image, a row of the panel for each, and a record of all; later runs leave no file of another."""
    images, out = [folder / "1.png", folder / "2.png"], tmp_path / "out"
    assert run("-i", images[0]).exit_code == 0
    one = Image.open(out / "panel.png")
    done = run("-i", images[0], "-i", images[1], "--refine", "1")
    assert done.exit_code == 0, done.output
    assert sorted(content(out)) == sorted(files_of(2)) and "image-1.png" in files_of(2)
    engine = carve_kernels.CarveEngine(
        *carve_kernels.load(checkpoint), preset=carve_kernels.Preset(layers=(1, 2), max_new_tokens=2)
    )
    expected = engine.ask(images, QUESTION, refine=1)
    record = result_of(out)
    (numbers,) = record["presets"].values()
    assert record["images"] == [{"width": 160, "height": 96}, {"width": 96, "height": 120}]
    assert numbers["refined_images"] == [1] and numbers["box"] == numbers["images"][1]["box"] == list(expected.box)
    assert numbers["refined_ids"] == list(expected.refined_ids)
    assert [view["image"] for view in numbers["views"]] == [0, 1]
    for number, (image, found) in enumerate(zip(expected.images, numbers["images"], strict=True)):
        assert found["box"] == list(image.regions.box) and found["strength"] == image.strength
        assert found["unseen"] == image.unseen and found["reason"] == image.reason
        assert numpy.array_equal(numpy.load(out / f"saliency-{number}.npy"), image.saliency.numpy())
        assert Image.open(out / f"image-{number}.png").tobytes() == Image.open(images[number]).tobytes()
        assert Image.open(out / f"refined-{number}.png").tobytes() == image.refined.tobytes()
    both = Image.open(out / "panel.png")
    assert both.width == one.width and both.height > 1.6 * one.height
    assert "of image 1" in done.stdout
    refused = run("-i", images[1], "--refine", "3")
    assert refused.exit_code == 2
    assert refused.stderr == "error: --refine: expected 0, the only image, or no --refine, got '3'\n"
    assert run("-i", images[1]).exit_code == 0
    assert sorted(content(out)) == sorted(FILES)


def test_a_panel_says_what_is_of_all_images(run: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []

    def listed(rows: Any, **texts: Any) -> Any:
        captions.extend(tile.caption for row in rows for tile in row if tile.title.startswith("Attention"))
        return panel(rows, **texts)

    monkeypatch.setattr("carve_kernels.cli.report.panel", listed)
    assert run().exit_code == 0
    assert len(captions) == 2 and not any("all images" in caption for caption in captions)
    captions.clear()
    assert run("-i", folder / "1.png", "-i", folder / "2.png").exit_code == 0
    assert len(captions) == 4 and sum("\nof all images: entropy" in caption for caption in captions) == 2
    assert sum("\nof all images: mass" in caption for caption in captions) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--refine", "2"), "error: --refine: expected all, or numbers of images from 0 to 1, each once, such as"),
        (("--refine", "one"), "refine: expected all, or numbers of images such as 1 or 0,2, got 'one'"),
        (("-i", "missing.png"), "image: missing.png is missing"),
    ],
)
def test_bad_images_are_refused(
    run: Invoke, tmp_path: Path, folder: Path, words: tuple[str, ...], message: str
) -> None:
    done = run("-i", folder / "1.png", "-i", folder / "2.png", *words)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "out").exists()


def test_equals_the_engine(run: Invoke, tmp_path: Path, checkpoint: Path, image_file: Path) -> None:
    assert run("--rows", "word:red", "--steps", "t_start").exit_code == 0
    engine = carve_kernels.CarveEngine(
        *carve_kernels.load(checkpoint),
        preset=carve_kernels.Preset(layers=(1, 2), rows=("word", "red"), steps="t_start", max_new_tokens=2),
    )
    expected = engine(image_file, QUESTION)
    (numbers,) = result_of(tmp_path / "out")["presets"].values()
    assert numbers["answer_ids"] == list(expected.answer_ids)
    assert numbers["refined_ids"] == list(expected.refined_ids)
    assert numbers["box"] == list(expected.box)
    assert numbers["entropy"] == {str(layer): value for layer, value in expected.entropy.items()}
    assert numpy.array_equal(numpy.load(tmp_path / "out/saliency.npy"), expected.saliency.numpy())


def test_a_preset_file_opens_every_parameter(run: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"preset": "release", "connectivity": 8, "normalize": "max", "fill": [9, 9, 9]}))
    assert run("--preset", file, "--top", 1, "--lam", 0.01, "--keep", 0.3).exit_code == 0
    numbers = result_of(tmp_path / "out")["presets"]["mine"]
    assert numbers["preset"] == {
        "preset": "release",
        "layers": [1, 2],
        "lam": 0.01,
        "normalize": "max",
        "keep": 0.3,
        "top": 1,
        "floor": None,
        "connectivity": 8,
        "fill": [9, 9, 9],
        "max_new_tokens": 2,
    }
    assert len(numbers["boxes"]) == 1


def test_the_profile_of_the_checkpoint_is_the_default(run: Invoke, tmp_path: Path) -> None:
    folder = tiny_models.save(*tiny_models.tiny_llava(), tmp_path / "model")
    (folder / "carve.json").write_text(json.dumps({"rows": "question", "lam": 0.5}))
    assert run("-m", folder).exit_code == 0
    assert result_of(tmp_path / "out")["presets"]["profile"]["preset"]["rows"] == "question"
    assert run("-m", folder, "--preset", "paper").exit_code == 0
    assert "rows" not in result_of(tmp_path / "out")["presets"]["paper"]["preset"]


@pytest.mark.parametrize(("words", "rows"), [("last", "last"), ("2", 2), ("question", "question"), ("-3,-2", [-3, -2])])
def test_rows(run: Invoke, tmp_path: Path, words: str, rows: Any) -> None:
    done = run("--rows", words, "--steps", "t_full")
    assert done.exit_code == 0, done.output
    (numbers,) = result_of(tmp_path / "out")["presets"].values()
    assert numbers["preset"].get("rows", "last") == rows


def test_dtype_and_attention(run: Invoke, tmp_path: Path) -> None:
    model, processor = tiny_models.tiny_llava()
    folder = tiny_models.save(model.to(torch.float16), processor, tmp_path / "half")
    assert run("-m", folder, "--attn", "eager", "--device", "cpu").exit_code == 0
    facts = result_of(tmp_path / "out")["model"]
    assert (facts["dtype"], facts["attention"], facts["device"]) == ("float32", "eager", "cpu")
    assert run("-m", folder, "--dtype", "bfloat16").exit_code == 0
    assert result_of(tmp_path / "out")["model"]["dtype"] == "bfloat16"


def test_qwen_keeps_a_flat_image_whole(run: Invoke, tmp_path: Path) -> None:
    folder = tiny_models.save(*tiny_models.tiny_qwen2_5_vl(), tmp_path / "qwen")
    Image.new("RGB", (1, 1), "white").save(tmp_path / "one.png")
    done = run("-m", folder)
    assert done.exit_code == 0, done.output
    assert run("-i", tmp_path / "one.png").exit_code == 0
    (numbers,) = result_of(tmp_path / "out")["presets"].values()
    assert numbers["reason"]
    assert numbers["boxes"] == []
    assert numbers["kept"] == 1


def test_other_files_stay_and_earlier_results_go(run: Invoke, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert run("-q", "hello").exit_code == 0
    assert run().exit_code == 0
    assert sorted(content(folder)) == sorted([*FILES, "notes.txt"])
    assert (folder / "notes.txt").read_text() == "mine"
    assert result_of(folder)["question"] == QUESTION


def test_parsing() -> None:
    assert parse_layers("20-25") == tuple(range(20, 26))
    assert parse_layers("3,5") == (3, 5)
    assert parse_layers("-1") == (-1,)
    assert parse_layers("-4--2, 0") == (-4, -3, -2, 0)
    assert parse_layers("paper") == "paper" and parse_layers("all") == "all"
    assert [parse_rows(text) for text in ("last", "4", "question", "word:red", "text:a: red, cat", "3,5")] == [
        "last",
        4,
        "question",
        ("word", "red"),
        ("text", "a: red, cat"),
        (3, 5),
    ]
    assert parse_lam("mean") == "mean"
    assert parse_lam("1e-8") == 1e-8


def test_rows_of_a_text(run: Invoke, tmp_path: Path, checkpoint: Path, image_file: Path) -> None:
    assert run("--rows", "text:digit is red").exit_code == 0
    engine = carve_kernels.CarveEngine(
        *carve_kernels.load(checkpoint),
        preset=carve_kernels.Preset(layers=(1, 2), rows=("text", "digit is red"), max_new_tokens=2),
    )
    expected = engine(image_file, QUESTION)
    assert numpy.array_equal(numpy.load(tmp_path / "out/saliency.npy"), expected.saliency.numpy())
    assert "; text 'digit is red'; " in report._settings(expected)


def test_help_and_version_are_quick() -> None:
    code = (
        "import sys, carve_kernels.cli\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    printed = subprocess.run(
        [sys.executable, "-m", "carve_kernels", "--version"], check=True, capture_output=True, text=True, timeout=60
    )
    assert printed.stdout == f"carve-kernels {carve_kernels.__version__}\n"
