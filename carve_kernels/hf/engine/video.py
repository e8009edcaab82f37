"""CARVE on a video: contrast its frames, keep the salient part in space and time, and ask about that part again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from carve_kernels import checks
from carve_kernels.hf.decoding import Branch, PromptGroup, exclusive
from carve_kernels.hf.decoding.sequential import decode_prompt
from carve_kernels.hf.engine.passes import Setup
from carve_kernels.hf.engine.whole_layers import whole_layers
from carve_kernels.hf.image_inputs import ImageFeatures
from carve_kernels.hf.layouts import layout_of
from carve_kernels.hf.model import check_steady
from carve_kernels.hf.video_inputs import build_video_prompt, divided, video_inputs
from carve_kernels.hf.videos import Video
from carve_kernels.maps import AttentionMaps
from carve_kernels.presets import Preset
from carve_kernels.types import Regions, VisualLayout
from carve_kernels.video import VideoSaliency, contrast_frames

if TYPE_CHECKING:
    from carve_kernels.hf.engine.engine import CarveEngine

KEY_FRAMES = 5


@dataclass(frozen=True)
class VideoResult:
    """The result of CARVE for one question about a video.

    ==============  ==================================================================================================
    question        as it was passed; `prompt` is the whole text that the model read
    answer          the plain answer, empty without `plain`; `answer_ids` its tokens
    refined_answer  the answer on the refined video; `refined_ids` its tokens
    video           the frames that the model was shown; `refined` is the kept span of them, cropped to `box`, and not
                    shorter than the frames that the model puts together
    saliency        a VideoSaliency: `saliency[f]` is that of a frame, float32 [H, W]
    regions         the selected regions over space and time; `box` is x0 y0 f0 x1 y1 f1, pixels and frames
    key_frames      the frames with the largest share of the contrast, in the order of time
    task, general   the captured maps of the question and of the general instruction
    preset          the preset that was used
    reason          why the whole video was kept, or None
    seconds         the time of each stage: first pass, contrast, regions, second pass
    ==============  ==================================================================================================
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

    @property
    def box(self) -> tuple[int, ...]:
        return self.regions.box

    @property
    def layout(self) -> VisualLayout:
        """Where the tokens of the video are in the first prompt."""
        return cast(VisualLayout, self.task.layout)


def ask_video(
    engine: CarveEngine,
    video: Video,
    question: str,
    *,
    prompt: str | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> VideoResult:
    """Answer a question about a video on its frames, and again on the kept part of it; see `CarveEngine.ask_video`.

    Prompts are decoded one by one. Raises TypeError or ValueError, before the model runs, for what cannot be used.
    """
    if not isinstance(video, Video):
        raise TypeError(f"video: expected a Video, as open_video returns it, got {checks.describe(video)}")
    checks.text("question", question)
    if engine.fit is not None:
        raise ValueError(f"fit: expected None for a video, got {engine.fit!r}: only images are padded")
    report = on_stage or (lambda stage: None)
    model, processor, preset = engine.model, engine.processor, engine.preset
    check_steady(model)
    texts = [
        build_video_prompt(processor, question + preset.suffix) if prompt is None else checks.text("prompt", prompt),
        build_video_prompt(processor, preset.general_prompt + preset.suffix),
    ]
    prompts = [_Prompt.of(engine, video, text) for text in texts]
    with exclusive(model):
        setup = Setup(
            model, processor, preset, engine.carving, engine.layers,
            backend=engine.backend, memory=None, plain=engine.plain, fit=None,
        )  # fmt: skip
        report("first pass")
        start = time.perf_counter()
        task = prompts[0].decode(engine, setup.task_new_tokens, preset.rows)
        general = prompts[1].decode(engine, setup.general_new_tokens, setup.general_rows)
        seconds = {"first pass": time.perf_counter() - start}
        report("carve")
        start = time.perf_counter()
        whole = whole_layers(task.maps, general.maps, engine.carving)
        carving = replace(engine.carving, layer_weights=whole.weights)
        views = prompts[0].layout.views[0]
        saliency = contrast_frames(whole.task, whole.general, views, video.size, preset=carving, backend=engine.backend)
        seconds["contrast"], start = time.perf_counter() - start, time.perf_counter()
        regions = saliency.regions()
        seconds["regions"] = time.perf_counter() - start
        reason, refined = regions.reason, video
        plain_ids = task.ids if engine.plain else ()
        refined_ids = plain_ids
        report("second pass")
        start = time.perf_counter()
        if reason is None:
            refined = video.crop(regions.box, getattr(processor.video_processor, "temporal_patch_size", 1))
        is_whole = refined.size == video.size and len(refined) == len(video)
        if not is_whole or not engine.plain:
            try:
                second = _Prompt.of(engine, refined, texts[0])
            except ValueError as error:
                # The processor may refuse a very thin crop; the results so far are kept.
                reason = f"the refined video cannot be shown to the model: {error}"
            else:
                refined_ids = second.decode(engine, preset.max_new_tokens, None).ids
        seconds["second pass"] = time.perf_counter() - start
    return VideoResult(
        question=question,
        prompt=texts[0],
        answer=_text(processor, plain_ids),
        refined_answer=_text(processor, refined_ids),
        video=video,
        refined=refined,
        saliency=saliency,
        regions=regions,
        key_frames=saliency.key_frames(KEY_FRAMES),
        task=task.maps,
        general=general.maps,
        preset=preset,
        reason=reason,
        seconds=seconds,
        answer_ids=plain_ids,
        refined_ids=refined_ids,
    )


@dataclass(frozen=True)
class _Prompt:
    """A prompt about a video as the model takes it."""

    inputs: dict[str, Any]
    features: ImageFeatures
    layout: VisualLayout

    @classmethod
    def of(cls, engine: CarveEngine, video: Video, text: str) -> _Prompt:
        inputs = video_inputs(engine.model, engine.processor, video, text)
        layout = layout_of(engine.model, engine.processor, inputs, videos=[[video]])
        text_inputs, entries = divided(inputs)
        return cls(text_inputs, ImageFeatures(lambda: entries), layout)

    def decode(self, engine: CarveEngine, new_tokens: int, rows: Any) -> Branch:
        branch = Branch(self.inputs, new_tokens, rows)
        group = PromptGroup(self.features, int(self.layout.tokens().max()) + 1, self.layout)
        decoded = decode_prompt(engine.model, engine.processor, group, branch, engine.layers, engine.backend)
        branch.ids = decoded.ids
        if decoded.maps is not None:
            branch.maps = decoded.maps
        return branch


def _text(processor: Any, ids: tuple[int, ...]) -> str:
    answer: str = processor.decode(list(ids), skip_special_tokens=True)
    return answer.strip()
