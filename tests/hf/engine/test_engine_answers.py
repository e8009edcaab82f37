"""With every saving on, both answers are those of `generate` calls of their own, and the maps are the session's."""

from __future__ import annotations

import math
from typing import Any

import pytest

from carve_kernels import CarveEngine, Preset, capture_attention, load
from carve_kernels.hf.decoding import prefix_cache
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.models import small
from carve_kernels.models.scenes import draw_scene
from tests.support.families import FAMILIES
from tests.support.tiny_models import make_image

PHOTO = make_image(240, 160, 1)
QUESTIONS = ["what digit is red", "where is the square at the left of the image"]
STEPS = ["t_end", "t_start", "t_full"]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten keys are NaN."""
    resize = prefix_cache._resize

    def poisoned(cached: Any, like: Any, length: int, capacity: int) -> Any:
        resized = resize(cached, like, length, capacity)
        resized[:, :, length if cached is not None else 0 :] = math.nan
        return resized

    monkeypatch.setattr(prefix_cache, "_resize", poisoned)


def check(model: Any, processor: Any, preset: Preset, result: Any) -> None:
    asked = result.question + preset.suffix
    inputs = prepare(processor, [result.image], build_prompt(processor, asked), None, preset.max_pixels)
    words = preset.max_new_tokens
    assert list(result.answer_ids) == greedy_generate(model, inputs, words, processor).tolist()
    images = [result.refined] if preset.images == "refined" else [result.image, result.refined]
    last = prepare(processor, images, build_prompt(processor, asked, len(images)), None, preset.max_pixels)
    assert list(result.refined_ids) == greedy_generate(model, last, words, processor).tolist()
    general = build_prompt(processor, preset.general_prompt + preset.suffix)
    for maps, prompt in ((result.task, build_prompt(processor, asked)), (result.general, general)):
        inputs = prepare(processor, [result.image], prompt, None, preset.max_pixels)
        with capture_attention(model, layers=result.task.layers, rows=preset.rows, processor=processor) as session:
            greedy_generate(model, inputs, words, processor)
        expected = session.maps.values[:, :, : len(maps.steps)]
        assert maps.values.shape == expected.shape
        assert float((maps.values - expected).abs().max()) <= 1e-5 * float(expected.max())


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "sdpa") for name in FAMILIES),
        # The savings are the same under eager; one family of three takes a third of the time.
        *(pytest.param(name, "eager", marks=pytest.mark.slow if name != "llava" else ()) for name in FAMILIES),
    ],
)
def test_tiny_models_under_a_repetition_penalty(name: str, implementation: str) -> None:
    model, processor = FAMILIES[name]()
    model.set_attn_implementation({"text_config": implementation})
    model.generation_config.repetition_penalty = 1.05
    presets = [Preset.paper(steps=steps, max_new_tokens=6) for steps in STEPS]
    for preset in [*presets, Preset.release(layers=(1, 2), max_new_tokens=6)]:
        # A second question finds the image in memory.
        engine = CarveEngine(model, processor, preset=preset)
        assert engine.sequential_reason is None
        for question in QUESTIONS:
            check(model, processor, preset, engine(PHOTO, question))


@pytest.mark.parametrize("preset", ["its own", "paper", "release"])
def test_the_embedded_model(preset: str) -> None:
    model, processor = load(small(), dtype="float32")
    release = Preset.release(layers=(1, 2), max_new_tokens=4)
    settings = None if preset == "its own" else Preset.paper(max_new_tokens=4) if preset == "paper" else release
    engine = CarveEngine(model, processor, preset=settings)
    for seed in range(3):
        scene = draw_scene(seed, 1 + seed)
        check(model, processor, engine.preset, engine(scene.image, scene.question))
