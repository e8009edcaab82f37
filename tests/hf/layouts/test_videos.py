"""Layouts of videos with the real processors: which frames and which part of them each token shows, by coordinates."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
import transformers
from PIL import Image

from carve_kernels.hf.families import VIDEO_FAMILIES
from carve_kernels.hf.layouts import layout_of
from carve_kernels.hf.processors import takes_settings
from carve_kernels.hf.video_inputs import build_video_prompt, video_inputs
from carve_kernels.hf.videos import Video
from carve_kernels.types import View, VisualLayout
from tests.support.processors.kinds import pair, pairs

SIZES = [(120, 90), (57, 211), (300, 100), (64, 64)]
NAMES = sorted(set(VIDEO_FAMILIES) & set(pairs()))
SQUARE = {"height": 56, "width": 56}
SEPARATE = ("smolvlm", "internvl")


def clip(count: int, size: tuple[int, int]) -> list[Image.Image]:
    """Frames whose red is x, whose green is y, and whose blue is the number of the frame."""
    width, height = size
    frame = numpy.zeros((height, width, 3))
    frame[..., 0] = 255 * (numpy.arange(width) + 0.5) / width
    frame[..., 1] = (255 * (numpy.arange(height) + 0.5) / height)[:, None]
    found = []
    for number in range(count):
        frame[..., 2] = 20 * number
        found.append(Image.fromarray(frame.round().astype(numpy.uint8)))
    return found


def prompt(name: str, processor: Any, videos: int = 1) -> str:
    mark = "<video>" if name == "smolvlm" else processor.video_token
    if name.startswith("glm"):
        mark = f"<|begin_of_video|>{mark}<|end_of_video|>"
    elif name.startswith("qwen") and "<|vision_start|>" in processor.tokenizer.get_vocab():
        mark = f"<|vision_start|>{mark}<|vision_end|>"
    return f"USER: {mark * videos} what digit is red ASSISTANT:"


def processed(name: str, videos: list[Any], **options: Any) -> tuple[Any, Any, Any]:
    model, processor = pair(name)
    if options and not takes_settings(processor):
        pytest.skip(f"the processor of transformers {transformers.__version__} takes no settings of videos")
    more: dict[str, Any] = {"use_token_compression": False} if name == "video_llama_3" else {}
    if takes_settings(processor):
        more["do_sample_frames"] = False
    # Of a package that spells out the number of frames.
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", str, create=True):
        inputs = processor(
            text=[prompt(name, processor, len(videos))], videos=[videos], return_tensors="pt", **more, **options
        )  # fmt: skip
    return model, processor, inputs


def colours(name: str, processor: Any, inputs: Any) -> torch.Tensor:
    """What each token of a video shows: the mean red, green and blue of its pixels, in the order of the tokens."""
    video_processor = processor.video_processor
    mean, std = (torch.tensor(getattr(video_processor, f"image_{part}")) for part in ("mean", "std"))
    if "video_grid_thw" in inputs:
        merge = int(getattr(video_processor, "merge_size", 2))
        patches = inputs["pixel_values_videos"].float()
        found = patches.view(len(patches) // merge**2, merge**2, 3, -1).mean((1, 3))
    else:
        pixels = inputs.get("pixel_values_videos")
        pixels = (inputs["pixel_values"] if pixels is None else pixels).float().flatten(0, -4)
        side = {"video_llava": 4}.get(name, 2)
        found = torch.nn.functional.adaptive_avg_pool2d(pixels, side).flatten(2).transpose(1, 2).flatten(0, 1)
    return (found * std + mean) * 255


def assert_places(views: list[View], colours: torch.Tensor, size: tuple[int, int]) -> None:
    """The middle of each token's box, within 0.05 of a cell and a level of the colours, and the mean of its frames."""
    width, height = size
    at = 0
    for view in views:
        left, top, right, bottom = view.box
        (rows, columns), (first, last) = view.grid, view.frame or (0, 0)
        for row in range(rows):
            for column in range(columns):
                red, green, blue = colours[at].tolist()
                x = left + (column + 0.5) * (right - left) / columns
                y = top + (row + 0.5) * (bottom - top) / rows
                assert abs(red / 255 * width - x) <= 0.05 * (right - left) / columns + width / 255, (view, row, column)
                assert abs(green / 255 * height - y) <= 0.05 * (bottom - top) / rows + height / 255, (view, row, column)
                numbers = list(range(first, last)) if last - first != 1 else [first, first]
                assert abs(blue / 20 - sum(numbers) / len(numbers)) < 0.1
                at += 1
    assert at == len(colours)


def check(layout: VisualLayout, inputs: Any, frames: int, size: tuple[int, int]) -> None:
    (row,) = layout.views
    tokens = torch.cat([view.tokens for view in row]).long()
    assert len(set(tokens.tolist())) == len(tokens) and bool((tokens.diff() > 0).all())
    assert len(set(inputs["input_ids"][0][tokens].tolist())) == 1
    assert layout.sizes == (((size[1], size[0]),),) and not layout.measured
    ends = [0]
    for view in row:
        assert view.kind == "frame" and view.frame is not None and view.frame[0] == ends[-1]
        ends.append(view.frame[1])
    assert ends[-1] == frames


@pytest.mark.parametrize(
    ("frames", "size"),
    [
        (5, SIZES[0]),
        (2, SIZES[1]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in product((1, 3, 8), SIZES[::2])),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_where_the_processor_put_it(name: str, frames: int, size: tuple[int, int]) -> None:
    if frames == 1 and name.startswith(("glm", "lfm3", "qwen3", "qwen4")):
        pytest.skip("its processor takes two frames or more")
    given = clip(frames, size)
    model, processor, inputs = processed(name, [given])
    layout = layout_of(model, processor, inputs, videos=[given])
    check(layout, inputs, frames, size)
    assert all(view.seconds is None and view.image == 0 for view in layout.views[0])
    assert_places(list(layout.views[0]), colours(name, processor, inputs), size)
    # The number of frames and their size are enough.
    again = layout_of(model, processor, inputs, videos=[(frames, size[1], size[0])])
    assert all(
        torch.equal(one.tokens, other.tokens) for one, other in zip(again.views[0], layout.views[0], strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_seconds_are_those_of_the_video_or_of_its_metadata(name: str) -> None:
    frames = clip(5, (120, 90))
    video = Video(tuple(frames), (0.5, 1.5, 2.5, 3.5, 4.5), 5.0, 2.0, 10)
    model, processor, inputs = processed(name, [frames], video_metadata=[video.metadata], return_metadata=True)
    layout = layout_of(model, processor, inputs, videos=[video])
    for view in layout.views[0]:
        first, last = view.frame or (0, 0)
        assert view.seconds == ((video.seconds[first]), video.end(last - 1))
    # What the processor returned says the same, where it is not dropped.
    known = layout_of(model, processor, inputs, videos=[frames])
    wanted = [view.seconds if "video_metadata" in inputs else None for view in layout.views[0]]
    assert [view.seconds for view in known.views[0]] == wanted
    # In transformers 5.12 SmolVLM's processor returns it, too.
    assert "video_metadata" in inputs or name in SEPARATE
    unknown = layout_of(model, processor, {**inputs, "video_metadata": None}, videos=[frames])
    assert all(view.seconds is None for view in unknown.views[0])


def test_a_rate_that_a_processor_made_up_is_no_time() -> None:
    frames = clip(4, (120, 90))
    model, processor, inputs = processed("qwen3_vl", [frames], return_metadata=True)
    assert inputs["video_metadata"][0].fps == 24
    assert all(view.seconds is None for view in layout_of(model, processor, inputs, videos=[frames]).views[0])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_frames_that_the_processor_chose(name: str) -> None:
    frames = clip(12, (120, 90))
    model, processor = pair(name)
    metadata = {"total_num_frames": 12, "fps": 4.0, "duration": 3.0, "frames_indices": list(range(12))}
    arguments = {"text": [prompt(name, processor)], "videos": [frames], "return_tensors": "pt", "fps": 2}
    arguments |= {"do_sample_frames": True, "video_metadata": [metadata]}
    inputs = processor(**arguments, return_metadata=True)
    layout = layout_of(model, processor, inputs, videos=[frames])
    chosen = [int(index) for index in inputs["video_metadata"][0].frames_indices]
    span = layout.views[0][-1].frame
    assert span is not None and 12 > span[1] >= len(set(chosen)) - 1
    assert layout.views[0][0].seconds is not None
    with pytest.raises(ValueError, match=r"videos: the processor shows \d groups of 2 frames of a video of 12"):
        layout_of(model, processor, {**inputs, "video_metadata": None}, videos=[frames])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEPARATE])
def test_images_and_videos_are_numbered_in_the_order_of_the_prompt(name: str) -> None:
    model, processor = pair(name)
    if not hasattr(model.config, "image_token_id") and not hasattr(model.config, "image_token_index"):
        pytest.skip("no images")
    frames, photograph = clip(4, (120, 90)), clip(1, (100, 64))[0]
    marks = {"glm": "<|begin_of_image|><|image|><|end_of_image|>", "qwe": "<|vision_start|><|image_pad|><|vision_end|>"}
    image = marks.get(name[:3], getattr(processor, "image_token", "<image>"))
    more = {"use_token_compression": False} if name == "video_llama_3" else {}
    if name in ("llava_next_video", "video_llava"):
        pytest.skip("the layout of its images is measured")
    inputs = processor(
        text=[f"{image} {prompt(name, processor)} {image}"], images=[photograph, photograph], videos=[frames],
        return_tensors="pt", do_sample_frames=False, **more,
    )  # fmt: skip
    layout = layout_of(model, processor, inputs, [[photograph, photograph]], [[frames]])
    assert layout.sizes == (((64, 100), (90, 120), (64, 100)),)
    numbers = [view.image for view in layout.views[0]]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2}
    assert all((view.frame is not None) == (view.image == 1) for view in layout.views[0])
    tokens = torch.cat([view.tokens for view in layout.views[0]])
    assert bool((tokens.diff() > 0).all())


@pytest.mark.parametrize("name", SEPARATE)
def test_a_family_with_the_same_tokens_for_both_refuses_both(name: str) -> None:
    frames = clip(4, (120, 90))
    model, processor, inputs = processed(name, [frames])
    with pytest.raises(ValueError, match=r"videos: prompts of .* have the same tokens for images and videos"):
        layout_of(model, processor, inputs, [frames[0]], [frames])


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_the_sound_of_a_video_is_between_its_tokens(name: str) -> None:
    frames, size = clip(8, SIZES[0]), SIZES[0]
    model, processor = pair(name)
    sound = numpy.sin(numpy.arange(4 * 16000) / 9).astype(numpy.float32)
    # The names of these settings in transformers 5.12, and in later ones.
    old = hasattr(processor, "replace_multimodal_special_tokens")
    given = {"use_audio_in_video": True} if old else {"audio_from_video_indices": [0], "load_audio_from_video": True}
    inputs = processor(
        text=[prompt(name, processor)], videos=[frames], audio=[sound], return_tensors="pt", do_sample_frames=False,
        **given,
    )  # fmt: skip
    layout = layout_of(model, processor, inputs, videos=[frames])
    check(layout, inputs, 8, size)
    tokens = torch.cat([view.tokens for view in layout.views[0]])
    assert int((tokens.diff() > 1).sum()) >= 1
    assert_places(list(layout.views[0]), colours(name, processor, inputs), size)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_the_positions_of_a_model_are_those_of_the_frames_in_time(name: str) -> None:
    _, processor = pair(name)
    video = Video(tuple(clip(8, (120, 90))), tuple(0.25 + 0.5 * number for number in range(8)), 4.0, 25.0, 100)
    text = build_video_prompt(processor, "x")
    for each in (video, video.crop((0, 0, 2, 90, 60, 6))):
        inputs = video_inputs(pair(name)[0], processor, each, text)
        seconds = inputs["second_per_grid_ts" if name == "qwen2_5_vl" else "video_second_per_grid"]
        assert seconds.tolist() == [1.0]


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "llava_onevision"])
def test_two_videos_in_a_prompt(name: str) -> None:
    one, other = clip(2, (120, 90)), clip(2, (120, 90))
    model, processor, inputs = processed(name, [one, other])
    layout = layout_of(model, processor, inputs, videos=[[one, other]])
    assert {view.image for view in layout.views[0]} == {0, 1} and layout.sizes == (((90, 120), (90, 120)),)
    with pytest.raises(ValueError, match="videos: "):
        layout_of(model, processor, inputs, videos=[one])


def test_tokens_that_were_dropped_are_refused() -> None:
    model, processor = pair("video_llama_3")
    frames = [Image.new("RGB", (120, 90), "red")] * 4
    inputs = processor(
        text=[prompt("video_llama_3", processor)], videos=[frames], return_tensors="pt", do_sample_frames=False,
        use_token_compression=True,
    )  # fmt: skip
    assert not bool(inputs["video_compression_mask"].all())
    with pytest.raises(ValueError, match=r"were dropped .* call the processor with use_token_compression=False"):
        layout_of(model, processor, inputs, videos=[frames])


@pytest.mark.parametrize(
    ("videos", "error", "message"),
    [
        ([[]], ValueError, "videos: "),
        ([[[]]], ValueError, "videos: expected at least one frame in each video"),
        ([(0, 90, 120)], ValueError, "videos: frames: expected an integer of at least 1"),
        ("clip.mp4", TypeError, "videos: expected a list of videos"),
        ([["clip.mp4"]], TypeError, "videos: expected a Video, a list of frames"),
        ([clip(1, (120, 90)) + clip(1, (64, 64))], ValueError, "videos: expected frames of one size"),
        ([clip(7, (120, 90))], ValueError, "videos: the processor shows 2 groups of 2 frames of a video of 7"),
        ([clip(4, (120, 90))] * 2, ValueError, r"videos: the inputs hold 1 video\(s\), got 2"),
        ([[clip(4, (120, 90))], [clip(4, (120, 90))], []], ValueError, r"videos: "),
    ],
)
def test_videos_that_do_not_fit_are_refused(videos: Any, error: type[Exception], message: str) -> None:
    frames = clip(4, (120, 90))
    model, processor, inputs = processed("qwen2_vl", [frames])
    with pytest.raises(error, match=message):
        layout_of(model, processor, inputs, videos=videos)
    with pytest.raises(ValueError, match="videos: expected the videos of the prompt, got None"):
        layout_of(model, processor, inputs, [frames[0]])


def test_a_family_without_a_layout_of_videos_names_those_that_have_one() -> None:
    model, processor = pair("gemma3")
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"videos: expected a model_type of exaone4_5, .*, got 'gemma3'"):
        layout_of(model, processor, inputs, videos=[clip(2, (64, 64))])
    without = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
    without.video_processor = None
    with pytest.raises(ValueError, match="processor: expected one with a video processor"):
        layout_of(pair("qwen2_vl")[0], without, inputs, videos=[clip(2, (64, 64))])


@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "internvl"])
def test_rows_of_very_low_frames_are_not_taken_for_channels(name: str, height: int) -> None:
    model, processor = pair(name)
    frames = tuple(Image.new("RGB", (60, height), (240, 120, 0)) for _ in range(2))
    inputs = video_inputs(model, processor, Video(frames, (0.0, 1.0), 2.0, 1.0, 2), build_video_prompt(processor, "x"))
    found = colours(name, processor, inputs)
    torch.testing.assert_close(found, torch.tensor([240.0, 120.0, 0.0]).expand_as(found), rtol=0, atol=0.5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen2_vl", {"merge_size": 1}),
        ("glm4v", {"merge_size": 4}),
        ("llava_next_video", {"do_resize": False}),
        ("video_llava", {"size": {"shortest_edge": 112}}),
        ("internvl", {"size": {"height": 112, "width": 112}, "do_center_crop": True, "crop_size": SQUARE}),
    ],
)  # fmt: skip
def test_settings_of_a_call_that_make_another_video_are_seen(name: str, settings: dict[str, Any]) -> None:
    """A video may fade in: the frame that varies most is compared."""
    size = (224, 112)
    frames = [*clip(2, size), *(Image.effect_noise(size, 90).convert("RGB") for _ in range(2))]
    model, processor, inputs = processed(name, [frames], **settings)
    with pytest.raises(ValueError, match=r"^inputs: pixel_values do not show the image of 112 x 224"):
        layout_of(model, processor, inputs, videos=[frames])
    model, processor, inputs = processed(name, [frames])
    assert layout_of(model, processor, inputs, videos=[frames]).views
    with pytest.raises(ValueError, match=r"^inputs: pixel_values do not show the image of 112 x 224"):
        layout_of(model, processor, inputs, videos=[[*frames[:2], *reversed(frames[2:])]])


@pytest.mark.parametrize("setting", ["merge_size", "patch_size", "temporal_patch_size"])
def test_settings_of_the_video_processor_that_are_not_the_models(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    frames = clip(4, (120, 90))
    model, processor, inputs = processed("qwen2_vl", [frames])
    monkeypatch.setattr(processor.video_processor, setting, 4)
    with pytest.raises(ValueError, match=rf"^processor: video_processor\.{setting} is 4, expected"):
        layout_of(model, processor, inputs, videos=[(4, 90, 120)])
