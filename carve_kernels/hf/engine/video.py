"""CARVE on a video: answer, contrast the maps of its frames, keep the salient span of time and space, answer again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch

from carve_kernels import checks
from carve_kernels.hf import names
from carve_kernels.hf.decoding import Branch, PromptGroup
from carve_kernels.hf.engine.passes import Setup, decode_answer, entropy_by_layer
from carve_kernels.hf.engine.whole_layers import whole_layers
from carve_kernels.hf.image_inputs import ImageFeatures, on_device, pixel_dtype
from carve_kernels.hf.inputs import build_prompt, text_settings
from carve_kernels.hf.layouts import layout_of
from carve_kernels.hf.model import image_token_positions, input_device, unwrap
from carve_kernels.hf.processors import is_pixels, lacks_token_types, video_token
from carve_kernels.hf.videos import Video, open_video
from carve_kernels.maps import AttentionMaps
from carve_kernels.ops.zoom import zoom
from carve_kernels.presets import Preset
from carve_kernels.types import Regions, VisualLayout
from carve_kernels.video import VideoSaliency, contrast_frames

VideoSource = str | os.PathLike[str] | Video


@dataclass(frozen=True)
class VideoResult:
    """The result of CARVE for one video and one question.

    ===============  =================================================================================================
    question         as it was passed; `prompt` is the whole text that the model read
    answer           the plain answer; `answer_ids` its tokens
    refined_answer   the answer on the refined video; `refined_ids` its tokens
    video            the frames that the model was given; `refined` is their part inside `box`, magnified
    task, general    the captured maps of the question and of the general instruction
    saliency         their contrast in pixels of the frames, float32 [H, W] for each frame when it is read
    regions          the selected regions over space and time, boxes x0 y0 f0 x1 y1 f1; `box` is theirs
    entropy          H / ln N of the task map for each layer that was read
    seconds          the time of each stage: first pass, contrast, regions, zoom, second pass
    preset           the preset that was used
    reason           why the whole video was kept, or None
    layers_left_out  captured layers that were not read: they did not see the whole video at the steps that are
    ===============  =================================================================================================
    """

    question: str
    prompt: str
    answer: str
    refined_answer: str
    video: Video
    refined: Video
    task: AttentionMaps
    general: AttentionMaps
    saliency: VideoSaliency
    regions: Regions
    entropy: dict[int, float]
    seconds: dict[str, float]
    preset: Preset
    reason: str | None = None
    answer_ids: tuple[int, ...] = field(default=(), repr=False)
    refined_ids: tuple[int, ...] = field(default=(), repr=False)
    layers_left_out: tuple[int, ...] = ()

    @property
    def layout(self) -> VisualLayout:
        """Where the tokens of the video are in the first prompt, and which frames they show."""
        return cast(VisualLayout, self.task.layout)

    @property
    def box(self) -> tuple[int, ...]:
        """The part of the video that was refined: x0 y0 f0 x1 y1 f1."""
        return self.regions.box

    def key_frames(self, count: int) -> list[int]:
        """The frames with the largest mass, in the order of time."""
        return self.saliency.key_frames(count)


class VideoPrompt(NamedTuple):
    """A prompt about videos as the model takes it."""

    text: str
    inputs: dict[str, Any]
    features: ImageFeatures
    known: dict[str, Any]


@dataclass(frozen=True, eq=False)
class VideoRequest:
    """One video and one question after loading, checks and processing."""

    video: Video
    question: str
    task: VideoPrompt
    general: VideoPrompt
    layouts: tuple[VisualLayout, VisualLayout]


def make_video_request(
    model: Any,
    processor: Any,
    preset: Preset,
    video: VideoSource,
    question: str,
    prompt: str | None,
    fit: str | None,
    **opening: Any,
) -> VideoRequest:
    """Check a video and a question, open the video and run the processor; the model does not run."""
    checks.text("question", question)
    if fit is not None:
        raise ValueError(f"fit: expected None for a video, got {fit!r}: frames are shown as their processor does it")
    if prompt is not None:
        checks.text("prompt", prompt)
        if preset.images != "refined":
            raise ValueError(
                "prompt: expected None where the last question shows two videos "
                f"(images={preset.images!r}), since one prompt cannot hold one and then two; "
                f"got {checks.describe(prompt)}"
            )
    video_token(processor)
    if not isinstance(video, (str, os.PathLike, Video)):
        raise TypeError(f"video: expected a path or a Video, got {checks.describe(video)}")
    opened = video if isinstance(video, Video) else open_video(video, **opening)
    texts = [
        build_prompt(processor, question + preset.suffix, 0, 1) if prompt is None else prompt,
        build_prompt(processor, preset.general_prompt + preset.suffix, 0, 1),
    ]
    task, general = (video_prompt(model, processor, [opened], text) for text in texts)
    layouts = (layout_of(model, processor, each.known, videos=[[opened]]) for each in (task, general))
    return VideoRequest(opened, question, task, general, (next(layouts), next(layouts)))


def video_prompt(model: Any, processor: Any, videos: Sequence[Video], text: str) -> VideoPrompt:
    """The model inputs of a prompt and its videos, all of whose frames are shown."""
    expected = text.count(video_token(processor))
    if expected != len(videos):
        raise ValueError(f"videos: the prompt has {expected} video(s), got {len(videos)}; give one video for each")
    settings = text_settings(processor, text)
    if lacks_token_types(processor, unwrap(model)):
        settings["return_mm_token_type_ids"] = True
    if getattr(processor.video_processor, "use_token_compression", False):
        # Each token that it drops would have no map.
        settings["use_token_compression"] = False
    try:
        returned = processor(
            text=[text],
            videos=[list(video.frames) for video in videos],
            video_metadata=[video.metadata for video in videos],
            do_sample_frames=False,
            return_tensors="pt",
            **settings,
        )
    except ValueError as error:
        sizes = " and ".join(f"{len(video)} x {video.size[0]} x {video.size[1]}" for video in videos)
        raise ValueError(f"video: the processor refuses {sizes} frames and pixels ({error})") from error
    known = on_device(returned, input_device(model), pixel_dtype(model))
    inputs = {name: value for name, value in known.items() if not is_pixels(name)}
    entries = {name: value for name, value in known.items() if not names.is_text(name)}
    return VideoPrompt(text, inputs, ImageFeatures(lambda: entries), known)


def answer_video(setup: Setup, request: VideoRequest, report: Callable[[str], None]) -> VideoResult:
    """Both passes of one request; `report` is called with the name of each stage before it."""
    report("first pass")
    seconds: dict[str, float] = {}
    with _timed(seconds, "first pass"):
        task = Branch(request.task.inputs, setup.task_new_tokens, setup.preset.rows)
        general = Branch(request.general.inputs, setup.general_new_tokens, setup.general_rows)
        for prompt, layout, branch in zip(
            (request.task, request.general), request.layouts, (task, general), strict=True
        ):
            group = PromptGroup(prompt.features, int(layout.tokens().max()) + 1, layout)
            group.branches.append(branch)
            setup.decoder.decode([group])
    report("carve")
    whole = whole_layers(task.maps, general.maps, setup.carving)
    carving = replace(setup.carving, layer_weights=whole.weights)
    with _timed(seconds, "contrast"):
        views, size = request.layouts[0].views[0], request.video.size
        saliency = contrast_frames(whole.task, whole.general, views, size, preset=carving, backend=setup.backend)
    with _timed(seconds, "regions"):
        regions = saliency.regions()
    with _timed(seconds, "zoom"):
        refined = request.video if regions.reason is not None else refined_video(request.video, regions, carving)
    report("second pass")
    reason, refined_ids = regions.reason, task.ids
    with _timed(seconds, "second pass"):
        if reason is None:
            try:
                second = _second_prompt(setup, request, refined)
            except ValueError as error:
                reason = f"the refined video cannot be shown to the model: {error}"
            else:
                refined_ids = _decode_again(setup, second)
    return VideoResult(
        question=request.question,
        prompt=request.task.text,
        answer=decode_answer(setup.processor, task.ids),
        refined_answer=decode_answer(setup.processor, refined_ids),
        video=request.video,
        refined=refined,
        task=task.maps,
        general=general.maps,
        saliency=saliency,
        regions=regions,
        entropy=entropy_by_layer(task.maps, setup.preset.steps, whole.left_out),
        seconds=seconds,
        preset=setup.preset,
        reason=reason,
        answer_ids=task.ids,
        refined_ids=refined_ids,
        layers_left_out=whole.left_out,
    )


def refined_video(video: Video, regions: Regions, preset: Preset) -> Video:
    """The span of frames and the part of each that the box of the regions has, magnified as an image is.

    What is not selected stays visible: a frame without a region would be black.
    """
    x0, y0, first, x1, y1, last = regions.box
    box = x0, y0, x1, y1
    everything = torch.ones(video.size, dtype=torch.bool)
    frames = tuple(
        zoom(frame, everything, box, fill=preset.fill, resample=preset.resample, size=preset.size, limit=preset.limit)
        for frame in video.frames[first:last]
    )
    return replace(video, frames=frames, seconds=video.seconds[first:last], duration=video.end(last - 1))


def _second_prompt(setup: Setup, request: VideoRequest, refined: Video) -> VideoPrompt:
    if setup.preset.images == "refined":
        return video_prompt(setup.model, setup.processor, [refined], request.task.text)
    text = build_prompt(setup.processor, request.question + setup.preset.suffix, 0, 2)
    return video_prompt(setup.model, setup.processor, [request.video, refined], text)


def _decode_again(setup: Setup, prompt: VideoPrompt) -> tuple[int, ...]:
    columns = image_token_positions(unwrap(setup.model), prompt.inputs["input_ids"])[0]
    group = PromptGroup(prompt.features, int(columns[-1]) + 1)
    group.branches.append(Branch(prompt.inputs, setup.preset.max_new_tokens))
    setup.decoder.decode([group])
    return group.branches[0].ids


class _timed:
    """Adds the seconds of a stage to a dict."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._stage] = time.perf_counter() - self._start
