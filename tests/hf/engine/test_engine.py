"""CarveEngine: answers are generate's, maps are eager's, every part of the result."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset, capture_attention, carve
from carve_kernels.complexity import complexity
from carve_kernels.hf.inputs import build_prompt, prepare
from tests.support.families import family, greedy, in_eager, state, watched
from tests.support.tiny_models import make_image, tiny_llava

QUESTION = "what digit is red"
SHORT = Preset.paper(max_new_tokens=6)
RELEASE = Preset.release(layers=(1, 2), max_new_tokens=6)
PHOTO = make_image(240, 160, 1)


def last_rows(name: str, text: str, preset: Preset) -> list[torch.Tensor]:
    """Eager's head means at the image tokens, [L, N] for each step."""
    model, processor = in_eager(name), family(name)[1]
    inputs = prepare(processor, [PHOTO], build_prompt(processor, text), None, preset.max_pixels)
    columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    with torch.no_grad():
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=preset.max_new_tokens, return_dict_in_generate=True,
            output_attentions=True,
        )  # fmt: skip
    return [torch.stack([layer[0, :, -1, columns].mean(0) for layer in step]) for step in output.attentions]


@pytest.mark.parametrize("preset", [SHORT, Preset.paper(steps="t_full", max_new_tokens=6), RELEASE])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_vl"])
def test_a_question_is_answered_twice(name: str, preset: Preset) -> None:
    model, processor = family(name)
    asked = QUESTION + preset.suffix
    answer = greedy(name, [PHOTO], asked, preset)
    before = state(model)
    result = CarveEngine(model, processor, preset=preset)(PHOTO, QUESTION)
    assert state(model) == before
    assert list(result.answer_ids) == answer
    images = [result.refined] if preset.images == "refined" else [PHOTO, result.refined]
    assert list(result.refined_ids) == greedy(name, images, asked, preset)

    layers = preset.layers_of(4)
    for maps, text in ((result.task, asked), (result.general, preset.general_prompt + preset.suffix)):
        assert maps.layers == layers
        for step, expected in enumerate(last_rows(name, text, preset)):
            assert torch.allclose(maps.values[0, :, step, 0], expected[list(layers)], rtol=1e-4, atol=1e-7)

    view = result.task.layout.views[0][0]
    outcome = carve(
        PHOTO, result.task.values[0, :, :, 0], result.general.values[0, :, :, 0], grid=view.grid, box=view.box,
        preset=preset,
    )  # fmt: skip
    assert torch.equal(result.saliency, outcome.saliency) and result.saliency.shape == (160, 240)
    assert torch.equal(result.mask, outcome.regions.mask) and torch.equal(result.boxes, outcome.regions.boxes)
    assert result.box == outcome.regions.box and result.refined.tobytes() == outcome.refined.tobytes()
    assert 0 < int(result.mask.sum()) < 160 * 240 and result.reason is None

    end = slice(-1, None) if preset.steps == "t_end" else slice(None)
    assert list(result.entropy) == list(layers)
    for layer, value in zip(layers, result.task.entropy[0, :, end, 0].mean(-1), strict=True):
        assert math.isclose(result.entropy[layer], float(value), rel_tol=1e-6) and 0 < result.entropy[layer] < 1
    assert result.complexity == complexity(PHOTO)
    assert (
        set(result.seconds) == {"first pass", "contrast", "regions", "zoom", "second pass"}
        and min(result.seconds.values()) > 0
    )
    assert result.question == QUESTION and result.image.size == PHOTO.size and result.preset == preset


def test_the_first_step_alone_costs_one_step_of_the_general_instruction() -> None:
    model, processor = family("llava")
    preset = Preset.paper(steps="t_start", max_new_tokens=6)
    result = CarveEngine(model, processor, preset=preset)(PHOTO, QUESTION)
    assert result.general.steps == (0,) and result.task.steps == tuple(range(6))
    expected = carve(
        PHOTO, result.task.values[0, :, :1, 0], result.general.values[0, :, :, 0],
        grid=(6, 6), box=result.task.layout.views[0][0].box, preset=preset,
    )  # fmt: skip
    assert torch.equal(result.saliency, expected.saliency)


@pytest.mark.parametrize("rows", ["question", ("word", "red"), ("text", "digit is red"), 3])
def test_other_rows(rows: Any) -> None:
    model, processor = family("llava")
    result = CarveEngine(model, processor, preset=Preset.paper(rows=rows, max_new_tokens=4))(PHOTO, QUESTION)
    assert int(result.mask.sum()) > 0 and list(result.answer_ids) == greedy("llava", [PHOTO], QUESTION, SHORT)[:4]


def test_a_prompt_of_ones_own_replaces_the_template() -> None:
    model, processor = family("llava")
    engine = CarveEngine(model, processor, preset=SHORT)
    prompt = "<image> Only this: what digit is red"
    result = engine(PHOTO, QUESTION, prompt=prompt)
    assert result.prompt == prompt
    inputs = prepare(processor, [PHOTO], prompt)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    assert list(result.answer_ids) == ids[0, inputs["input_ids"].shape[1] :].tolist()
    with pytest.raises(ValueError, match=r"prompt: expected '<image>' for each of 1 image\(s\), got 2 in str"):
        engine(PHOTO, QUESTION, prompt="<image><image> which")
    with pytest.raises(ValueError, match=r"prompt: expected '<image>' for each of 1 image\(s\), got 0"):
        engine(PHOTO, QUESTION, prompt="which")
    with pytest.raises(ValueError, match="prompt: expected None where the last question shows more images"):
        CarveEngine(model, processor, preset=RELEASE)(PHOTO, QUESTION, prompt=prompt)


def test_the_generation_config_of_the_model_holds() -> None:
    model, processor = tiny_llava()
    model.generation_config.repetition_penalty = 1.8
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    kept = model.generation_config.to_dict()
    result = CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    assert model.generation_config.to_dict() == kept
    inputs = prepare(processor, [PHOTO], build_prompt(processor, QUESTION))
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(result.answer_ids) == ids != greedy("llava", [PHOTO], QUESTION, SHORT)


def test_an_answer_that_ends_at_once() -> None:
    model, processor = tiny_llava()
    model.generation_config.eos_token_id = greedy("llava", [PHOTO], QUESTION, SHORT)[0]
    result = CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    assert result.task.steps == (0,) and len(result.answer_ids) == 1 and result.answer_ids[0] not in (None,)
    assert int(result.mask.sum()) > 0


def test_progress_is_reported() -> None:
    model, processor = family("llava")
    calls: list[tuple[str, int, int]] = []
    CarveEngine(model, processor, preset=SHORT)(
        PHOTO, QUESTION, on_progress=lambda stage, done, total: calls.append((stage, done, total))
    )
    assert calls == [("first pass", 0, 3), ("carve", 1, 3), ("second pass", 2, 3), ("done", 3, 3)]


def test_a_map_without_contrast_keeps_the_whole_image() -> None:
    model, processor = family("llava")
    # The question is the general instruction: the ratio is flat, but for the weight of lam.
    engine = CarveEngine(model, processor, preset=Preset.paper(lam=0.0, max_new_tokens=4))
    # An open session has prompts asked one by one: two that are equal give the same bits.
    with capture_attention(model, layers=[1]):
        result = engine(PHOTO, engine.preset.general_prompt)
    assert result.reason is not None and "constant" in result.reason
    assert result.refined.tobytes() == result.image.tobytes() and bool(result.mask.all()) and len(result.boxes) == 0
    assert result.refined_ids == result.answer_ids and result.box == (0, 0, 240, 160)


def test_what_the_model_noted_of_positions_is_put_back() -> None:
    model, processor = family("qwen2_5_vl")
    inputs = prepare(processor, [PHOTO], build_prompt(processor, QUESTION))
    engine = CarveEngine(model, processor, preset=SHORT)
    following = torch.tensor([[70]])
    with torch.no_grad():
        alone, beside = (model(**inputs, use_cache=True).past_key_values for _ in range(2))
        expected = model(input_ids=following, past_key_values=alone).logits
        deltas = model.model.rope_deltas.clone()
        engine(make_image(300, 80), QUESTION)
        assert torch.equal(model.model.rope_deltas, deltas)
        assert torch.equal(model(input_ids=following, past_key_values=beside).logits, expected)


def test_a_refined_image_that_the_processor_refuses_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = family("qwen2_5_vl")
    thin = Preset.paper(max_new_tokens=4, size=(1, 600))
    result = CarveEngine(model, processor, preset=thin)(PHOTO, QUESTION)
    assert result.reason is not None and "600 x 1 pixels" in result.reason
    assert result.refined_ids == result.answer_ids and 0 < int(result.mask.sum()) < 160 * 240


def test_ctrl_c_in_the_middle_leaves_the_model_as_it_was() -> None:
    model, processor = family("qwen2_5_vl")
    before = state(model)
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    layer = model.model.language_model.layers[1]
    with pytest.raises(KeyboardInterrupt), watched(layer, before=interrupt):
        CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    assert state(model) == before
    result = CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    assert list(result.answer_ids) == greedy("qwen2_5_vl", [PHOTO], QUESTION, SHORT)


@pytest.mark.parametrize("steps", ["t_start", "t_end"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_without_a_plain_answer_the_last_question_may_show_both_images(name: str, steps: str) -> None:
    preset = replace(RELEASE, steps=steps)
    result = CarveEngine(*family(name), preset=preset, plain=False)(PHOTO, QUESTION)
    assert list(result.refined_ids) == greedy(name, [PHOTO, result.refined], QUESTION + preset.suffix, preset)
