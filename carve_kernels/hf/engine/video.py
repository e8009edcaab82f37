"""CARVE on a video: answer, contrast the maps of its frames, keep the salient span of time and space, answer again."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from carve_kernels import checks
from carve_kernels.hf.decoding import Branch, PromptGroup
from carve_kernels.hf.engine.passes import Setup, decode_answer, entropy_by_layer
from carve_kernels.hf.engine.requests import check_texts
from carve_kernels.hf.engine.whole_layers import whole_layers
from carve_kernels.hf.image_inputs import ImageFeatures
from carve_kernels.hf.layouts import layout_of
from carve_kernels.hf.model import image_token_positions, unwrap
from carve_kernels.hf.video_inputs import build_video_prompt, check_takes_videos, divided, video_inputs
from carve_kernels.hf.videos import Video, open_frames
from carve_kernels.maps import AttentionMaps
from carve_kernels.presets import Preset
from carve_kernels.types import Regions, VisualLayout, brief
from carve_kernels.video import VideoSaliency, contrast_frames

VideoSource = str | os.PathLike[str] | Video
KEY_FRAMES = 5


@dataclass(frozen=True)
class VideoResult:
    """The result of CARVE for one video and one question.

    ===============  =================================================================================================
    question         as it was passed; `prompt` is the whole text that the model read
    answer           the plain answer, empty without `plain`; `answer_ids` its tokens
    refined_answer   the answer on the refined video; `refined_ids` its tokens
    video            the frames that the model was given; `refined` is the kept span of them, cropped to `box`, and not
                     shorter than the frames that the model puts together; all frames where a processor cannot put
                     videos of different lengths into one prompt (images="original+refined")
    saliency         a VideoSaliency: `saliency[f]` is that of a frame, float32 [H, W]
    regions          the selected regions over space and time; `box` is x0 y0 f0 x1 y1 f1, pixels and frames
    key_frames       the frames with the largest share of the contrast, in the order of time
    task, general    the captured maps of the question and of the general instruction
    preset           the preset that was used
    reason           why the whole video was kept, or None
    seconds          the time of each stage: first pass, contrast, regions, zoom, second pass
    entropy          H / ln N of the task map for each layer that was read
    layers_left_out  captured layers that were not read: they did not see the whole video at the steps that are
    ===============  =================================================================================================
    """

    question: str
    prompt: str
    answer: str
    refined_answer: str
    video: Video
    refined: Video
    saliency: VideoSaliency
    regions: Regions
    key_frames: list[int]
    task: AttentionMaps
    general: AttentionMaps
    preset: Preset
    reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    answer_ids: tuple[int, ...] = field(default=(), repr=False)
    refined_ids: tuple[int, ...] = field(default=(), repr=False)
    entropy: dict[int, float] = field(default_factory=dict)
    layers_left_out: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return brief(
            self, question=self.question, answer=self.answer, refined_answer=self.refined_answer, video=self.video,
            box=self.box, key_frames=self.key_frames, reason=self.reason, seconds=math.fsum(self.seconds.values()),
        )  # fmt: skip

    @property
    def box(self) -> tuple[int, ...]:
        return self.regions.box

    @property
    def layout(self) -> VisualLayout:
        """Where the tokens of the video are in the first prompt, and which frames they show."""
        return cast(VisualLayout, self.task.layout)


class VideoPrompt(NamedTuple):
    """A prompt about videos as the model takes it; of a first pass, with the places of the tokens."""

    text: str
    inputs: dict[str, Any]
    features: ImageFeatures
    layout: VisualLayout | None = None


@dataclass(frozen=True, eq=False)
class VideoRequest:
    """One video and one question after loading, checks and processing."""

    video: Video
    question: str
    task: VideoPrompt
    general: VideoPrompt


def refuse_fit(fit: str | None) -> None:
    """Raise ValueError for a fit: there is none of videos."""
    if fit is not None:
        raise ValueError(f"fit: expected None for a video, got {fit!r}: frames are shown as their processor does it")


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
    check_texts(question, prompt, preset, "videos")
    refuse_fit(fit)
    check_takes_videos(model, processor)
    if isinstance(video, Video):
        for name in ("max_frames", "fps"):
            if opening[name] is not None:
                raise ValueError(
                    f"{name}: expected None for a Video: all its frames are read, got {checks.describe(opening[name])}"
                )
    elif isinstance(video, (str, os.PathLike)):
        given = {name: value for name, value in opening.items() if value is not None}
        video = open_frames("video", video, **given)
    else:
        raise TypeError(f"video: expected a path or a Video, got {checks.describe(video)}")
    texts = [
        build_video_prompt(processor, question + preset.suffix) if prompt is None else prompt,
        build_video_prompt(processor, preset.general_prompt + preset.suffix),
    ]
    task, general = (_prompt(model, processor, [video], text, located=True) for text in texts)
    return VideoRequest(video, question, task, general)


def answer_video(setup: Setup, request: VideoRequest, report: Callable[[str], None]) -> VideoResult:
    """Both passes of one request; `report` is called with the name of each stage before it."""
    seconds: dict[str, float] = {}
    report("first pass")
    with _timed(seconds, "first pass"):
        task = _decode(setup, request.task, setup.task_new_tokens, setup.preset.rows)
        general = _decode(setup, request.general, setup.general_new_tokens, setup.general_rows)
    report("carve")
    whole = whole_layers(task.maps, general.maps, setup.carving)
    carving = replace(setup.carving, layer_weights=whole.weights)
    layout = cast(VisualLayout, request.task.layout)
    with _timed(seconds, "contrast"):
        saliency = contrast_frames(
            whole.task, whole.general, layout.views[0], request.video.size, preset=carving, backend=setup.backend
        )
    with _timed(seconds, "regions"):
        regions = saliency.regions()
    refined, reason = request.video, regions.reason
    with _timed(seconds, "zoom"):
        if reason is None:
            # A model may put a few frames together, and cannot read fewer.
            least = getattr(setup.processor.video_processor, "temporal_patch_size", 1)
            refined = request.video.crop(regions.box, least)
    report("second pass")
    plain_ids = task.ids if setup.plain else ()
    refined_ids = plain_ids
    is_whole = refined.size == request.video.size and len(refined) == len(request.video)
    with _timed(seconds, "second pass"):
        if not is_whole or not setup.plain or setup.preset.images != "refined":
            try:
                second, refined = _second_prompt(setup, request, refined, regions.box)
            except ValueError as error:
                # The processor may refuse a very thin crop; the results so far are kept.
                reason = f"the refined video cannot be shown to the model: {error}"
            else:
                refined_ids = _decode(setup, second, setup.preset.max_new_tokens, None).ids
    return VideoResult(
        question=request.question,
        prompt=request.task.text,
        answer=decode_answer(setup.processor, plain_ids),
        refined_answer=decode_answer(setup.processor, refined_ids),
        video=request.video,
        refined=refined,
        saliency=saliency,
        regions=regions,
        key_frames=saliency.key_frames(KEY_FRAMES),
        task=task.maps,
        general=general.maps,
        preset=setup.preset,
        reason=reason,
        seconds=seconds,
        answer_ids=plain_ids,
        refined_ids=refined_ids,
        entropy=entropy_by_layer(task.maps, setup.preset.steps, whole.left_out),
        layers_left_out=whole.left_out,
    )


def _prompt(model: Any, processor: Any, videos: Sequence[Video], text: str, located: bool = False) -> VideoPrompt:
    inputs = video_inputs(model, processor, videos, text)
    layout = layout_of(model, processor, inputs, videos=[list(videos)]) if located else None
    text_inputs, entries = divided(inputs)
    return VideoPrompt(text, text_inputs, ImageFeatures(lambda: entries), layout)


def _second_prompt(
    setup: Setup, request: VideoRequest, refined: Video, box: Sequence[int]
) -> tuple[VideoPrompt, Video]:
    """The refined video in place of the original, or after it (`Preset.images`), and the video that it shows."""
    if setup.preset.images == "refined":
        return _prompt(setup.model, setup.processor, [refined], request.task.text), refined
    text = build_video_prompt(setup.processor, request.question + setup.preset.suffix, 2)
    try:
        return _prompt(setup.model, setup.processor, [request.video, refined], text), refined
    except ValueError:
        # Processors that stack the pixels of videos take only videos of equally many frames.
        refined = request.video.crop(box, len(request.video))
        return _prompt(setup.model, setup.processor, [request.video, refined], text), refined


def _decode(setup: Setup, prompt: VideoPrompt, new_tokens: int, rows: Any) -> Branch:
    columns = image_token_positions(unwrap(setup.model), prompt.inputs["input_ids"])[0]
    branch = Branch(prompt.inputs, new_tokens, rows)
    group = PromptGroup(prompt.features, int(columns[-1]) + 1, prompt.layout, branches=[branch])
    setup.decoder.decode([group])
    return branch


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note the seconds of a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - start
