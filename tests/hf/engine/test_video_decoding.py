"""How prompts about videos are decoded: as trees where a model allows it, by `generate` elsewhere, equal either way."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from carve_kernels import CarveEngine, Preset
from carve_kernels.hf import names
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.engine.video import VideoResult
from carve_kernels.hf.families import VIDEO_FAMILIES
from carve_kernels.hf.model import attention_modules, text_backbone
from carve_kernels.hf.video_inputs import build_video_prompt, video_inputs
from carve_kernels.hf.videos import Video
from tests.support.processors.kinds import pair, pairs
from tests.support.tiny_models import make_image

QUESTION = "what digit is red"
NAMES = sorted(set(VIDEO_FAMILIES) & set(pairs()))
CLIP = Video(
    tuple(make_image(120, 90, seed) for seed in range(6)), tuple(0.5 * index for index in range(6)), 3.0, 2.0, 6
)


@pytest.fixture(autouse=True)
def _num2words() -> Any:
    # Of a package that spells out the number of frames.
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", str, create=True):
        yield


def engine_of(name: str, **changes: Any) -> tuple[Any, Any, CarveEngine]:
    model, processor = pair(name)
    layers, windows = sorted(attention_modules(model)), names.windows(text_backbone(model).config)
    layers = [layer for layer in layers if windows is None or windows[layer] is None][-2:]
    preset = Preset.paper(**{"layers": layers, "max_new_tokens": 2, "keep": 0.1, "top": 1, **changes})
    return model, processor, CarveEngine(model, processor, preset=preset)


def generated(model: Any, processor: Any, videos: list[Video]) -> tuple[int, ...]:
    inputs = video_inputs(model, processor, videos, build_video_prompt(processor, QUESTION, len(videos)))
    return tuple(greedy_generate(model, inputs, 2, processor).tolist())


@pytest.mark.parametrize("name", NAMES)
def test_trees_and_one_prompt_after_the_other_are_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, engine = engine_of(name)
    found = engine.ask_video(CLIP, QUESTION)
    assert found.answer_ids == generated(model, processor, [CLIP])
    assert found.reason is not None or found.refined_ids == generated(model, processor, [found.refined])
    assert found.layers_left_out == () and set(found.entropy) == set(engine.layers)
    monkeypatch.setattr("carve_kernels.hf.decoding.sequential_reason", lambda _: "planted")
    other: VideoResult = engine.ask_video(CLIP, QUESTION)
    assert (other.answer_ids, other.refined_ids, other.box) == (found.answer_ids, found.refined_ids, found.box)
    for one, two in ((found.task, other.task), (found.general, other.general)):
        # Both are 0 where a model's own sparse attention hides a token.
        torch.testing.assert_close(one.values, two.values, rtol=1e-4, atol=0)


def test_a_model_that_allows_it_decodes_trees() -> None:
    _, _, engine = engine_of("qwen2_5_vl")
    assert engine.sequential_reason is None
    with mock.patch("carve_kernels.hf.decoding.decode_prompt", side_effect=RuntimeError("one by one")):
        assert engine.ask_video(CLIP, QUESTION).answer_ids


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v"])
def test_the_refined_video_after_the_original(name: str) -> None:
    model, processor, engine = engine_of(name, images="original+refined")
    result = engine.ask_video(CLIP, QUESTION)
    assert result.reason is None and len(result.refined) < len(CLIP)
    assert result.refined_ids == generated(model, processor, [CLIP, result.refined])


@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "video_llava"])
def test_where_videos_have_to_be_of_one_length_all_frames_are_cropped(name: str) -> None:
    model, processor, engine = engine_of(name, images="original+refined")
    result = engine.ask_video(CLIP, QUESTION)
    x0, y0, f0, x1, y1, f1 = result.box
    assert result.reason is None and f1 - f0 < len(CLIP)
    assert len(result.refined) == len(CLIP) and result.refined.size == (y1 - y0, x1 - x0)
    assert result.refined_ids == generated(model, processor, [CLIP, result.refined])


def test_a_prompt_of_ones_own() -> None:
    model, processor, engine = engine_of("qwen2_5_vl")
    prompt = "look: <|vision_start|><|video_pad|><|vision_end|> what digit is red"
    result = engine.ask_video(CLIP, QUESTION, prompt=prompt)
    ids = greedy_generate(model, video_inputs(model, processor, CLIP, prompt), 2, processor)
    assert result.prompt == prompt and result.answer_ids == tuple(ids.tolist())
    with pytest.raises(ValueError, match=r"videos: the prompt has 0 video\(s\), got 1"):
        engine.ask_video(CLIP, QUESTION, prompt="what")
    both = engine_of("qwen2_5_vl", images="original+refined")[2]
    with pytest.raises(ValueError, match="prompt: expected None where the last question shows more videos"):
        both.ask_video(CLIP, QUESTION, prompt=prompt)
