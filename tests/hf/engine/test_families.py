"""The engine on every family with its real classes: answers are `generate`'s, maps a session's, also of two images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf import names
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.families import FAMILIES
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.model import attention_modules, text_backbone
from carve_kernels.maps import AttentionMaps
from tests.support.processors.kinds import pair, pairs, zoo_kind
from tests.support.tiny_models import make_image
from tests.support.tolerances import relative

QUESTION = "what digit is red"
PHOTO, OTHER = make_image(150, 100, 1), make_image(90, 130, 2)
# What the installed transformers itself cannot run with an image, and its error.
ERRORS = {"llama4": "image_outputs"}
BROKEN = {name: ERRORS[name] for name in pairs() if zoo_kind(name).broken_in == names.version()}
# In transformers 5.12 its vision tower attends from one image to the other; the engine encodes a refined one by itself.
MIXED = ("minimax_m3_vl",) if names.version().startswith("5.12.") else ()
# Their processors take one image a prompt.
ONE_IMAGE = ("fuyu",)
REFUSED = {name: family.reason for name in pairs() if (family := FAMILIES.get(name)) and family.reason is not None}
NAMES = [name for name in pairs() if name not in BROKEN and name not in REFUSED]
# A family of each kind of layout, and those whose vision towers do not convert their pixels; the others take a minute.
FEW = ("qwen3_vl", "llava_next", "internvl", "idefics3", "molmo2", "gemma3", "gemma4", "mistral3", "deepseek_vl",
       "kimi_k25", "lfm3_vl", "chameleon", "paligemma")  # fmt: skip


def settings(model: Any, **changes: Any) -> Preset:
    """The last layers without a sliding window, which is shorter than these prompts in some tiny models."""
    layers, windows = sorted(attention_modules(model)), names.windows(text_backbone(model).config)
    layers = [layer for layer in layers if windows is None or windows[layer] is None][-2:]
    return Preset.release(**{"layers": layers, "max_new_tokens": 2, "suffix": "", "keep": 0.2, **changes})


def inputs_of(processor: Any, images: list[Image.Image], text: str, preset: Preset, dtype: torch.dtype) -> Any:
    """What the processor returns for a prompt, as a user passes it to `generate`."""
    prompt = build_prompt(processor, text, len(images))
    # Of these processors, only Cosmos3 Edge's leaves out what its model needs.
    types = type(processor).__name__ == "Cosmos3EdgeProcessor"
    inputs = prepare(processor, images, prompt, None, preset.max_pixels, types).to(dtype)
    inputs.pop("labels", None)
    return inputs


def generated(model: Any, processor: Any, inputs: Mapping[str, Any], preset: Preset) -> list[int]:
    ids: list[int] = greedy_generate(model, inputs, preset.max_new_tokens, processor).tolist()
    return ids


def captured(model: Any, processor: Any, inputs: Mapping[str, Any], like: AttentionMaps, steps: int) -> AttentionMaps:
    """The maps of a session at the tokens of a layout."""
    with capture_attention(
        model, processor=processor, layers=like.layers, tokens=like.layout, max_steps=steps
    ) as session:
        greedy_generate(model, inputs, steps, processor)
    return session.maps


def deviation(found: AttentionMaps, expected: AttentionMaps, steps: int) -> float:
    """The largest relative difference of maps in the first steps; keys that a window leaves out are 0 in both."""
    count = min(steps, found.values.shape[2])
    if not torch.equal(found.valid[:, :, :count], expected.valid[:, :, :count]):
        return float("inf")
    values, truth = found.values[:, :, :count], expected.values[:, :, :count]
    return relative(values[(values != 0) | (truth != 0)], truth[(values != 0) | (truth != 0)])


@pytest.mark.parametrize("name", NAMES)
def test_one_image_and_the_refined_one_after_it(name: str) -> None:
    model, processor = pair(name)
    preset = settings(model, images="refined" if name in ONE_IMAGE else "original+refined")
    result = CarveEngine(model, processor, preset=preset).ask(PHOTO, QUESTION)
    inputs = inputs_of(processor, [PHOTO], QUESTION, preset, model.dtype)
    assert list(result.answer_ids) == generated(model, processor, inputs, preset)
    assert deviation(result.task, captured(model, processor, inputs, result.task, 2), 2) < 1e-4
    inputs = inputs_of(processor, [PHOTO], preset.general_prompt, preset, model.dtype)
    assert deviation(result.general, captured(model, processor, inputs, result.general, 2), 2) < 1e-4
    if name in MIXED:
        pytest.skip(f"the vision tower of transformers {names.version()} mixes images")
    displayed = [result.refined] if name in ONE_IMAGE else [PHOTO, result.refined]
    inputs = inputs_of(processor, displayed, QUESTION, preset, model.dtype)
    assert list(result.refined_ids) == generated(model, processor, inputs, preset)
    assert result.reason is None and result.refined.tobytes() != PHOTO.tobytes()
    # What the model saw is what the views cover, and nothing is selected beside it.
    assert float((~result.seen).float().mean()) == pytest.approx(result.unseen, abs=0.03)
    assert not bool((result.mask & ~result.seen).any()) and float(result.saliency[result.seen].min()) >= 0


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in NAMES if name not in ONE_IMAGE],
)
def test_two_images_in_bfloat16(name: str) -> None:
    model, processor = copy.deepcopy(pair(name)[0]).to(torch.bfloat16), pair(name)[1]
    preset = settings(model, images="refined", max_new_tokens=1)
    images = [PHOTO, OTHER]
    result = CarveEngine(model, processor, preset=preset, memory=False).ask(images, QUESTION, refine="all")
    inputs = inputs_of(processor, images, QUESTION, preset, torch.bfloat16)
    expected = captured(model, processor, inputs, result.task, 1)
    assert result.task.dtype == expected.dtype == "bfloat16" and deviation(result.task, expected, 1) < 0.1
    assert {view.image for view in result.layout.views[0]} == {0, 1}
    assert [image.saliency.shape for image in result.images] == [(100, 150), (130, 90)]
    assert all(bool(image.saliency.isfinite().all()) for image in result.images)
    # Which token is the best may depend on a rounding; the refined images' tokens are in the second prompt.
    refined = [image.refined for image in result.images]
    inputs = inputs_of(processor, refined, QUESTION, preset, torch.bfloat16)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float()
    assert float(logits[result.refined_ids[0]]) >= float(logits.max()) - 0.1 * float(logits.std())


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_one_image_is_all_that_some_take(name: str) -> None:
    model, processor = pair(name)
    with pytest.raises(ValueError, match=r"images: the prompt has 1 image\(s\), got 2"):
        CarveEngine(model, processor, preset=settings(model)).ask([PHOTO, OTHER], QUESTION)


@pytest.mark.parametrize("name", BROKEN)
def test_what_transformers_cannot_run_itself(name: str) -> None:
    model, processor = pair(name)
    preset = settings(model)
    with pytest.raises(AttributeError, match=BROKEN[name]):
        generated(model, processor, inputs_of(processor, [PHOTO], QUESTION, preset, model.dtype), preset)
    with pytest.raises(AttributeError, match=BROKEN[name]):
        CarveEngine(model, processor, preset=preset).ask(PHOTO, QUESTION)


@pytest.mark.parametrize("name", REFUSED)
def test_families_whose_tokens_have_no_place_are_refused(name: str) -> None:
    model, processor = pair(name)
    with pytest.raises(
        ValueError, match=f"model: the image tokens of {name} have no place in the image: {REFUSED[name]}"
    ):
        CarveEngine(model, processor, preset=settings(model)).ask(PHOTO, QUESTION)
