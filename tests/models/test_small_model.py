"""The embedded small model: its files, its accuracy, its scenes, and the recipe in smoke mode."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open

from carve_kernels import Preset
from carve_kernels.models import scenes, small

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "small_vlm"
COUNT = 40


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(small(), local_files_only=True, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(small(), local_files_only=True)


def _prompt(processor: Any, text: str, images: int = 1) -> str:
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_is_small_and_half_precision() -> None:
    assert sum(path.stat().st_size for path in small().iterdir()) < 8e6
    with safe_open(small() / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_is_a_genuine_llava(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"


def test_profile_is_a_preset() -> None:
    profile = Preset.of(json.loads((small() / "carve.json").read_text()))
    assert profile.general_prompt == scenes.GENERAL
    assert profile.layers_of(5)


def test_prompt_ends_with_the_content_word(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    image = scenes.draw_scene(0, 1).image
    inputs = processor(images=[image, image], text=_prompt(processor, "What digit is red?", 2), return_tensors="pt")
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert words == ["<bos>", *["<image>"] * 288, "what", "digit", "is", "red"]
    assert inputs["pixel_values"].shape == (2, 3, 96, 96)


def _right(loaded: tuple[Any, Any], level: int) -> float:
    model, processor = loaded
    drawn = [scenes.draw_scene(seed, level, split="test") for seed in range(COUNT)]
    inputs = processor(
        images=[scene.image for scene in drawn],
        text=[_prompt(processor, scene.question) for scene in drawn],
        return_tensors="pt",
    )
    with torch.inference_mode():
        answers = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    words = [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]
    return sum(word == scene.answer for word, scene in zip(words, drawn, strict=True)) / COUNT


@pytest.mark.parametrize(("level", "least"), [(1, 0.8), (4, 0.45)])
def test_reads_digits(loaded: tuple[Any, Any], level: int, least: float) -> None:
    assert _right(loaded, level) >= least


def test_describes_with_pairs_of_colour_and_digit(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    scene = scenes.draw_scene(0, 1, split="test")
    inputs = processor(images=scene.image, text=_prompt(processor, scenes.GENERAL), return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    words = processor.decode(answer, skip_special_tokens=True).split()
    assert set(words[0::2]) <= set(scenes.COLOURS) and set(words[1::2]) <= set(scenes.DIGITS)
    assert set(words[0::2]) == {placed.colour for placed in scene.digits}


@pytest.mark.parametrize("level", scenes.LEVELS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_are_deterministic_and_boxes_contain_their_digits(level: int, split: scenes.Split) -> None:
    for seed in range(5):
        scene, again = (scenes.draw_scene(seed, level, split=split) for _ in range(2))
        assert scene.image.tobytes() == again.image.tobytes()
        assert (scene.question, scene.digits) == (again.question, again.digits)
        pixels = numpy.asarray(scene.image).astype(int)
        for placed in scene.digits:
            x0, y0, x1, y1 = placed.box
            near = (abs(pixels - scenes.PALETTE[placed.colour]) <= 20).all(-1)
            assert near[y0:y1, x0:x1].mean() > 0.04, (seed, placed)
        target = next(placed for placed in scene.digits if placed.box == scene.box)
        assert scene.question == f"what digit is {target.colour}" and scene.answer == scenes.DIGITS[target.digit]


def test_scenes_of_other_seeds_levels_and_splits_differ() -> None:
    keys = [(0, 1, "train"), (1, 1, "train"), (0, 2, "train"), (0, 1, "test")]
    drawn = {scenes.draw_scene(seed, level, split=split).image.tobytes() for seed, level, split in keys}
    assert len(drawn) == 4


@pytest.mark.parametrize(("level", "split"), [(0, "train"), (5, "train"), (1, "validation")])
def test_a_scene_that_does_not_exist_is_an_error(level: int, split: Any) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got"):
        scenes.draw_scene(0, level, split=split)


def test_the_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("rich", "scipy", "tokenizers"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--smoke", "--output", str(tmp_path)])
    before = set(sys.modules)
    try:
        runpy.run_path(str(RECIPE / "reproduce.py"), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(RECIPE)):
                del sys.modules[name]
    made = {path.name for path in (tmp_path / "model").iterdir()}
    shipped = {path.name for path in small().iterdir()}
    assert made == shipped
    result = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert set(result["accuracy"]) == {"1", "2", "3", "4"}
