"""The engine on a video: answers are `generate`'s, maps a session's, the refined video the selected span and part."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf import names
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.engine.video import VideoResult
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.layouts.videos import VIDEO_FAMILIES
from carve_kernels.hf.model import attention_modules, text_backbone
from carve_kernels.hf.videos import Video
from carve_kernels.maps import AttentionMaps
from carve_kernels.video import contrast_frames
from tests.support.processors.kinds import pair, pairs
from tests.support.tiny_models import make_image
from tests.support.tolerances import relative

QUESTION = "what digit is red"
NAMES = sorted(set(VIDEO_FAMILIES) & set(pairs()))
FRAMES = tuple(make_image(120, 90, seed) for seed in range(6))
CLIP = Video(FRAMES, tuple(0.5 * index for index in range(6)), 3.0, 2.0, 6)


def settings(model: Any, **changes: Any) -> Preset:
    layers, windows = sorted(attention_modules(model)), names.windows(text_backbone(model).config)
    layers = [layer for layer in layers if windows is None or windows[layer] is None][-2:]
    return Preset.paper(**{"layers": layers, "max_new_tokens": 2, **changes})


def processed(processor: Any, videos: list[Video], text: str) -> Any:
    """What the processor returns for a prompt about videos, all of whose frames are read."""
    more = {"use_token_compression": False} if type(processor).__name__ == "VideoLlama3Processor" else {}
    metadata = [video.metadata for video in videos]
    prompt = build_prompt(processor, text, 0, len(videos))
    return processor(
        text=[prompt], videos=[list(video.frames) for video in videos], video_metadata=metadata,
        do_sample_frames=False, return_tensors="pt", **more,
    )  # fmt: skip


def generated(model: Any, processor: Any, videos: list[Video], text: str) -> list[int]:
    ids: list[int] = greedy_generate(model, processed(processor, videos, text), 2, processor).tolist()
    return ids


def captured(model: Any, processor: Any, text: str, like: AttentionMaps) -> AttentionMaps:
    with capture_attention(model, processor=processor, layers=like.layers, tokens=like.layout, max_steps=2) as session:
        greedy_generate(model, processed(processor, [CLIP], text), 2, processor)
    return session.maps


@pytest.fixture(autouse=True)
def _num2words() -> Any:
    # Of a package that spells out the number of frames.
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", str, create=True):
        yield


def asked(name: str, **changes: Any) -> tuple[Any, Any, VideoResult]:
    model, processor = pair(name)
    engine = CarveEngine(model, processor, preset=settings(model, **changes))
    return model, processor, engine.ask_video(CLIP, QUESTION)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_generates_and_maps_are_a_sessions(name: str) -> None:
    model, processor, result = asked(name)
    assert list(result.answer_ids) == generated(model, processor, [CLIP], QUESTION)
    for maps, text in ((result.task, QUESTION), (result.general, result.preset.general_prompt)):
        expected = captured(model, processor, text, maps)
        assert relative(maps.values, expected.values[:, :, : maps.values.shape[2]]) < 1e-4
    assert result.reason is None and list(result.refined_ids) == generated(model, processor, [result.refined], QUESTION)
    # One saliency for each frame, and the part of the video that its regions have.
    assert len(result.saliency) == len(CLIP) and result.saliency[0].shape == (90, 120)
    x0, y0, first, x1, y1, last = result.box
    assert 0 <= x0 < x1 <= 120 and 0 <= y0 < y1 <= 90 and 0 <= first < last <= 6
    assert len(result.refined) == last - first and result.refined.seconds == CLIP.seconds[first:last]
    assert result.refined.duration == CLIP.end(last - 1)
    assert all(len(box) == 6 for box in result.regions.boxes.tolist())
    assert set(result.key_frames(2)) <= set(range(6))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v"])
def test_the_original_and_the_refined_video(name: str) -> None:
    model, processor, result = asked(name, images="original+refined")
    assert result.reason is None
    assert list(result.refined_ids) == generated(model, processor, [CLIP, result.refined], QUESTION)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
def test_some_processors_take_no_videos_of_two_lengths(name: str) -> None:
    _, _, result = asked(name, images="original+refined")
    assert len(result.refined) < len(CLIP) and result.refined_ids == result.answer_ids
    assert result.reason is not None and result.reason.startswith("the refined video cannot be shown to the model")


def test_the_saliency_is_the_contrast_of_the_tokens() -> None:
    _, _, result = asked("qwen2_5_vl")
    task, general = result.task.values[0, :, -1:, 0], result.general.values[0, :, -1:, 0]
    expected = contrast_frames(task, general, result.layout.views[0], CLIP.size, preset=result.preset)
    assert all(torch.equal(one, other) for one, other in zip(result.saliency, expected, strict=True))
    assert [view.frame for view in result.layout.views[0]] == [(0, 2), (2, 4), (4, 6)]
    assert [view.seconds for view in result.layout.views[0]] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]


def test_the_refined_video_is_cropped_and_magnified_in_the_same_way() -> None:
    _, _, result = asked("qwen2_5_vl", keep=0.05, top=1)
    x0, y0, first, x1, y1, last = result.box
    assert (x1 - x0) * (y1 - y0) * (last - first) < 120 * 90 * 6
    cropped = CLIP.crop(result.box)
    assert result.refined.size[0] >= cropped.size[0] and result.refined.size[1] >= cropped.size[1]
    for frame, part in zip(result.refined.frames, cropped.frames, strict=True):
        back = numpy.asarray(frame.resize(part.size, Image.Resampling.BOX), dtype=float)
        assert numpy.corrcoef(back.ravel(), numpy.asarray(part, dtype=float).ravel())[0, 1] > 0.95


def test_stages_are_reported() -> None:
    model, processor = pair("qwen2_vl")
    stages: list[tuple[str, int]] = []
    engine = CarveEngine(model, processor, preset=settings(model))
    result = engine.ask_video(CLIP, QUESTION, on_progress=lambda stage, done, _: stages.append((stage, done)))
    assert stages == [("first pass", 0), ("carve", 1), ("second pass", 2), ("done", 3)]
    assert set(result.seconds) == {"first pass", "contrast", "regions", "zoom", "second pass"}


def test_bad_input_is_refused_before_the_model_runs() -> None:
    model, processor = pair("qwen2_5_vl")
    engine = CarveEngine(model, processor, preset=settings(model))

    def ran(*_: Any) -> None:
        raise RuntimeError("the model ran")

    hook = model.register_forward_pre_hook(ran)
    try:
        for error, message, video, options in [
            (ValueError, "video: /none.mp4 is missing", "/none.mp4", {}),
            (TypeError, "video: expected a path or a Video, got list", list(FRAMES), {}),
            (ValueError, r"videos: the prompt has 0 video\(s\), got 1", CLIP, {"prompt": "what"}),
            (ValueError, "max_frames: expected an integer of at least 1", "/none.mp4", {"max_frames": 0}),
        ]:
            with pytest.raises(error, match=message):
                engine.ask_video(video, QUESTION, **options)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"text: contains the video token '<.video_pad.>', which stands for a video"
        ):
            engine.ask_video(CLIP, "what is <|video_pad|>")
        with pytest.raises(ValueError, match="fit: expected None for a video, got 'pad'"):
            CarveEngine(model, processor, preset=settings(model), fit="pad").ask_video(CLIP, QUESTION)
    finally:
        hook.remove()
    model, processor = pair("llava")
    with pytest.raises(ValueError, match="processor: expected one that takes videos, got LlavaProcessor"):
        CarveEngine(model, processor, preset=settings(model)).ask_video(CLIP, QUESTION)
