"""CarveEngine: answers are generate's, maps are eager's, every part of the result, and what goes wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, carve, load
from carve_kernels.complexity import complexity
from carve_kernels.hf.prompts import build_prompt, prepare
from tests.hf.looks import family, in_eager, state
from tests.hf.tiny import picture, save, tiny_llava

QUESTION = "what digit is red"
SHORT = Preset.paper(max_new_tokens=6)
RELEASE = Preset.release(layers=(1, 2), max_new_tokens=6)
PHOTO = picture(240, 160, 1)


def greedy(name: str, images: list[Image.Image], text: str, preset: Preset) -> list[int]:
    """The new tokens of `model.generate`, with nothing of the engine around it."""
    model, processor = family(name)
    inputs = prepare(processor, images, build_prompt(processor, text, len(images)), None, preset.max_pixels)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=preset.max_new_tokens)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


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
    shown = [result.refined] if preset.images == "refined" else [PHOTO, result.refined]
    assert list(result.refined_ids) == greedy(name, shown, asked, preset)

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
        set(result.seconds) == {"task", "general", "contrast", "regions", "zoom", "answer"}
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


@pytest.mark.parametrize("rows", ["question", ("word", "red"), 3])
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
    with pytest.raises(ValueError, match=r"images: the prompt has 2 image\(s\), got 1"):
        engine(PHOTO, QUESTION, prompt="<image><image> which")
    with pytest.raises(ValueError, match=r"images: the prompt has 0 image\(s\), got 1"):
        engine(PHOTO, QUESTION, prompt="which")
    with pytest.raises(ValueError, match="prompt: expected None where the last question shows two images"):
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


def test_a_profile_is_used_unless_the_caller_says_otherwise(tmp_path: Path) -> None:
    directory = save(*tiny_llava(), tmp_path / "model")
    profile = {"preset": "paper", "layers": [0, 1], "steps": "t_start", "max_new_tokens": 3}
    model, processor = load(directory)
    assert CarveEngine(model, processor).preset == Preset.paper()
    (directory / "carve.json").write_text(json.dumps(profile))
    engine = CarveEngine(model, processor)
    assert engine.layers == (0, 1) and engine.preset == Preset.from_dict(profile)
    assert CarveEngine(model, processor, profile=False).preset == Preset.paper()
    assert CarveEngine(model, processor, preset="paper").preset == Preset.paper()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"layers": [2]}))
    assert CarveEngine(model, processor, profile=other).layers == (2,)
    assert CarveEngine(model, processor, profile={"layers": [3]}).layers == (3,)
    with pytest.raises(ValueError, match=r"profile: expected the path of a carve\.json"):
        CarveEngine(model, processor, profile=tmp_path / "missing.json")
    with pytest.raises(ValueError, match="preset: expected keys among"):
        CarveEngine(model, processor, profile={"layer": [3]})
    (directory / "carve.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        CarveEngine(model, processor)


def test_layers_that_the_model_lacks() -> None:
    model, processor = family("llava")
    with pytest.raises(ValueError, match="expected layers 20 to 25 for preset release, got a model of 4 layers"):
        CarveEngine(model, processor, preset="release")
    with pytest.raises(ValueError, match="layers: expected numbers from -4 to 3"):
        CarveEngine(model, processor, preset={"layers": [7]})


@pytest.mark.parametrize("backend", ["nope", "CPU", "", None, 3])
def test_a_room_that_nobody_has_built(backend: Any) -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got"):
        CarveEngine(*family("llava"), preset=SHORT, backend=backend)


def test_no_request_has_no_answer() -> None:
    stages: list[str] = []
    assert CarveEngine(*family("llava"), preset=SHORT).answer([], stages.append) == [] and stages == []


def test_progress_is_reported() -> None:
    model, processor = family("llava")
    calls: list[tuple[str, int, int]] = []
    CarveEngine(model, processor, preset=SHORT)(
        PHOTO, QUESTION, on_progress=lambda stage, done, total: calls.append((stage, done, total))
    )
    assert calls == [("task", 0, 4), ("general", 1, 4), ("carve", 2, 4), ("answer", 3, 4), ("done", 4, 4)]


def test_a_map_without_contrast_keeps_the_whole_image() -> None:
    model, processor = family("llava")
    # The question is the general instruction: the ratio is flat, but for the weight of lam.
    engine = CarveEngine(model, processor, preset=Preset.paper(lam=0.0, max_new_tokens=4))
    result = engine(PHOTO, engine.preset.general_prompt)
    assert result.reason is not None and "constant" in result.reason
    assert result.refined.tobytes() == result.image.tobytes() and bool(result.mask.all()) and len(result.boxes) == 0
    assert result.refined_ids == result.answer_ids and result.box == (0, 0, 240, 160)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (400, 9)])
def test_small_and_thin_images(name: str, size: tuple[int, int]) -> None:
    model, processor = family(name)
    result = CarveEngine(model, processor, preset=Preset.paper(max_new_tokens=2))(picture(*size), QUESTION)
    assert result.saliency.shape == size[::-1] and min(result.refined.size) >= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_images_of_any_mode(mode: str) -> None:
    model, processor = family("llava")
    image = Image.new(mode, (50, 40))
    assert CarveEngine(model, processor, preset=Preset.paper(max_new_tokens=1))(image, QUESTION).image.mode == "RGB"


def test_bad_input_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    model, processor = family("llava")
    engine = CarveEngine(model, processor, preset=SHORT)
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(huge)
    before = state(model)
    ran: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    cases: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, "question: expected a string with at least one visible", (PHOTO, "  ")),
        (TypeError, "question: expected a string", (PHOTO, None)),
        (ValueError, "question|text", (PHOTO, "<image> what")),
        (ValueError, "image: cannot be used .expected at least one pixel, got 0 x 0", (Image.new("RGB", (0, 0)), "a")),
        (TypeError, "image: expected a path or a PIL image", (numpy.zeros((4, 4, 3)), QUESTION)),
        (ValueError, "image: .*broken.png cannot be read", (broken, QUESTION)),
        (ValueError, "image: .*missing.png is missing", (str(missing), QUESTION)),
        (ValueError, "image: .*huge.png is too large|20000 x 20000", (huge, QUESTION)),
        (ValueError, "prompt: expected a string with", (PHOTO, QUESTION, " ")),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            engine(*arguments)
    hook.remove()
    assert not ran and state(model) == before


def test_what_the_model_noted_of_positions_is_put_back() -> None:
    model, processor = family("qwen2_5_vl")
    inputs = prepare(processor, [PHOTO], build_prompt(processor, QUESTION))
    engine = CarveEngine(model, processor, preset=SHORT)
    following = torch.tensor([[70]])
    with torch.no_grad():
        alone, beside = (model(**inputs, use_cache=True).past_key_values for _ in range(2))
        expected = model(input_ids=following, past_key_values=alone).logits
        deltas = model.model.rope_deltas.clone()
        engine(picture(300, 80), QUESTION)
        assert torch.equal(model.model.rope_deltas, deltas)
        assert torch.equal(model(input_ids=following, past_key_values=beside).logits, expected)


def test_a_refined_image_that_the_processor_refuses_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = family("qwen2_5_vl")
    thin = Preset.paper(max_new_tokens=4, size=(1, 600))
    result = CarveEngine(model, processor, preset=thin)(PHOTO, QUESTION)
    assert result.reason is not None and "600 x 1 pixels" in result.reason
    assert result.refined_ids == result.answer_ids and 0 < int(result.mask.sum()) < 160 * 240


def test_weights_of_layers_are_counted_at_once() -> None:
    model, processor = family("llava")
    with pytest.raises(ValueError, match=r"layer_weights: expected one for each of layers \[0\]"):
        CarveEngine(model, processor, preset={"layers": [0], "layer_weights": [1, 2]})
    preset = {"layers": [0], "steps": "t_full", "step_weights": [1, 2], "max_new_tokens": 5}
    assert CarveEngine(model, processor, preset=preset)(PHOTO, QUESTION).saliency.shape == (160, 240)


def test_weights_belong_to_the_layers_as_they_were_named() -> None:
    model, processor = family("llava")
    named, ordered = (
        CarveEngine(model, processor, preset={"layers": layers, "layer_weights": weights, "max_new_tokens": 2})
        for layers, weights in (([3, 0], [9, 1]), ([0, 3], [1, 9]))
    )
    first, second = named(PHOTO, QUESTION), ordered(PHOTO, QUESTION)
    assert torch.equal(first.saliency, second.saliency) and first.preset.layer_weights == (9, 1)


def test_max_new_tokens_0() -> None:
    with pytest.raises(ValueError, match="max_new_tokens: expected an integer of at least 1, got int 0"):
        Preset.paper(max_new_tokens=0)


def test_a_model_that_computes_nan_is_named() -> None:
    model, processor = tiny_llava()
    with torch.no_grad():
        model.model.language_model.layers[3].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)


def test_ctrl_c_in_the_middle_leaves_the_model_as_it_was() -> None:
    model, processor = family("qwen2_5_vl")
    before = state(model)
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    hook.remove()
    assert state(model) == before
    result = CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    assert list(result.answer_ids) == greedy("qwen2_5_vl", [PHOTO], QUESTION, SHORT)
