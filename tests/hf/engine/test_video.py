"""CARVE on a video with tiny real models: answers equal generate's, maps a session's, the refined part is shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, capture_attention, contrast
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.video_inputs import build_video_prompt, video_inputs
from carve_kernels.hf.videos import Video
from carve_kernels.pipeline import pair
from carve_kernels.view_pixels import rectangle
from tests.hf.layouts.test_videos import clip
from tests.support.processors.kinds import pair as model_and_processor

PRESET = {"max_new_tokens": 3, "keep": 0.1, "top": 1}
QUESTION = "what digit is red"


def video(frames: int = 5, size: tuple[int, int] = (120, 90)) -> Video:
    return Video(
        tuple(clip(frames, size)), tuple(float(number) for number in range(frames)), float(frames), 1.0, frames
    )


def generated(model: Any, processor: Any, given: Video, text: str) -> tuple[int, ...]:
    inputs = video_inputs(model, processor, given, text)
    return tuple(greedy_generate(model, inputs, PRESET["max_new_tokens"], processor).tolist())


NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava_next_video", "llava_onevision", "video_llava",
         "video_llama_3", "internvl"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_generate_and_maps_those_of_a_session(name: str) -> None:
    model, processor = model_and_processor(name)
    given = video()
    stages: list[str] = []
    engine = CarveEngine(model, processor, preset=PRESET)
    result = engine.ask_video(given, QUESTION, on_progress=lambda stage, *_: stages.append(stage))
    assert stages == ["first pass", "carve", "second pass", "done"]
    text = build_video_prompt(processor, QUESTION + engine.preset.suffix)
    assert result.prompt == text and result.answer_ids == generated(model, processor, given, text)

    inputs = video_inputs(model, processor, given, text)
    with (
        torch.no_grad(),
        capture_attention(
            model, layers=engine.layers, rows="last", tokens=result.layout, processor=processor
        ) as session,
    ):
        model(**inputs)
    first = result.task.values[:, :, :1]
    torch.testing.assert_close(first, session.maps.values[:, :, :1], rtol=1e-4, atol=1e-7)

    # The saliency of a frame is the contrast of all tokens of the video, at those of the frame.
    views = result.layout.views[0]
    task, general = result.task.values[0, :, :, 0], result.general.values[0, :, :, 0]
    preset = engine.preset
    task, general, by_step = pair(task, general, preset.steps, step_weights=preset.step_weights)
    covered = [rectangle(view.box, given.size) for view in views]
    sizes = [(bottom - top, right - left) for left, top, right, bottom in filter(None, covered)]
    wanted = contrast(
        task, general, [view.grid for view in views], sizes, lam=preset.lam, step_weights=by_step,
        normalize=preset.normalize,
    )  # fmt: skip
    assert len(result.saliency) == 5 and result.saliency[0].shape == (90, 120)
    left, top, right, bottom = covered[-1] or (0, 0, 0, 0)
    torch.testing.assert_close(result.saliency[4][top:bottom, left:right], wanted[-1], rtol=1e-5, atol=1e-6)

    # The refined video is the kept span, cropped, and the second answer is generate's about it.
    assert result.reason is None
    x0, y0, f0, x1, y1, f1 = result.box
    if f1 - f0 < getattr(processor.video_processor, "temporal_patch_size", 1):
        # A last frame alone is no temporal patch.
        f0 -= 1
    assert result.refined.size == (y1 - y0, x1 - x0) and result.refined.seconds == given.seconds[f0:f1]
    assert result.refined.frames[0].tobytes() == given.frames[f0].crop((x0, y0, x1, y1)).tobytes()
    assert result.refined_ids == generated(model, processor, result.refined, text)
    assert result.key_frames == sorted(result.key_frames) and set(result.key_frames) <= set(range(5))


def test_a_file_is_opened(tmp_path: Any) -> None:
    from tests.hf.test_videos import write

    model, processor = model_and_processor("qwen2_vl")
    engine = CarveEngine(model, processor, preset=PRESET, plain=False)
    result = engine.ask_video(write(tmp_path / "clip.mp4"), QUESTION, max_frames=3)
    assert len(result.video) == 3 and result.answer == "" and result.refined_ids
    assert next(view.seconds for view in result.layout.views[0]) == pytest.approx((0.3, 1.6), abs=2e-3)


def test_what_cannot_be_used_is_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = model_and_processor("qwen2_vl")
    engine = CarveEngine(model, processor, preset=PRESET)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model has run"))
    with pytest.raises(ValueError, match="text: contains the video token"):
        engine.ask_video(video(), "what <|video_pad|>")
    with pytest.raises(ValueError, match="text: contains the image token"):
        engine.ask_video(video(), "what <|image_pad|>")
    with pytest.raises(ValueError, match=r"fps: expected None for a Video: .* got float 2\.0"):
        engine.ask_video(video(), QUESTION, fps=2.0)
    with pytest.raises(ValueError, match=r"max_frames: expected None for a Video: .* got int 3"):
        engine.ask_video(video(), QUESTION, max_frames=3)
    with pytest.raises(ValueError, match="max_frames: expected an integer of at least 1"):
        engine.ask_video("clip.mp4", QUESTION, max_frames=0)
    with pytest.raises(ValueError, match=r"video: .* is missing"):
        engine.ask_video("clip.mp4", QUESTION)
    with pytest.raises(TypeError, match="video: expected a path or a Video, got list"):
        engine.ask_video([], QUESTION)  # type: ignore[arg-type]
    padded = CarveEngine(model, processor, preset=PRESET, fit="pad")
    with pytest.raises(ValueError, match="fit: expected None for a video, got 'pad'"):
        padded.ask_video(video(), QUESTION)
    other = CarveEngine(*model_and_processor("gemma3"), preset=PRESET)
    with pytest.raises(ValueError, match="video: expected a model that takes videos; gemma3 takes images only"):
        other.ask_video(video(), QUESTION)


def test_a_constant_contrast_keeps_the_whole_video() -> None:
    model, processor = model_and_processor("qwen2_vl")
    engine = CarveEngine(model, processor, preset={**PRESET, "general_prompt": QUESTION, "lam": 0.0})
    result = engine.ask_video(video(), QUESTION)
    assert result.reason == "the saliency is constant" and result.refined is result.video
    assert result.refined_ids == result.answer_ids and result.box == (0, 0, 0, 120, 90, 5)
