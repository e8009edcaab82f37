"""CarveEngine: ask, see where the model looks, keep that part of the image, ask again."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from carve_kernels import checks
from carve_kernels.complexity import complexity
from carve_kernels.hf.backbone import decoder_layers, unwrap
from carve_kernels.hf.layouts import layout_of
from carve_kernels.hf.loading import profile_of
from carve_kernels.hf.prompts import MAX_IMAGE_PIXELS, build_prompt, open_image, prepare
from carve_kernels.hf.session import capture_attention
from carve_kernels.maps import AttentionMaps
from carve_kernels.pipeline import CarveOutcome, carve
from carve_kernels.presets import Preset
from carve_kernels.types import CarveResult, VisualLayout

OnProgress = Callable[[str, int, int], None]
STAGES = ("task", "general", "carve", "answer")

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


class _Look(NamedTuple):
    """One generation with its maps."""

    ids: tuple[int, ...]
    answer: str
    maps: AttentionMaps


class CarveEngine:
    """CARVE on a model: engine(image, question) -> CarveResult.

    ================  =================================================================================================
    argument          meaning
    ================  =================================================================================================
    model             a transformers model of a supported family
    processor         its processor
    preset            "paper", "release", a Preset or a dict of its fields; None takes the profile, and "paper" without
    profile           a dict, or the path of a carve.json: which rows and layers of this model see the question. None
                      takes the carve.json of the model's directory where there is one; False takes none
    backend           the room that captures, contrasts and finds regions
    max_image_pixels  the most pixels that an image may have
    ================  =================================================================================================

    Calling it: `image` is a path or a PIL image; `question` a text; `prompt`, if given, the whole text that the model
    reads, with one image token, in place of the chat template's; `on_progress(stage, done, total)` is called before
    each of the stages task, general, carve and answer, and once more at the end. Decoding is greedy under the model's
    own generation config. Where the refined image is the original, or cannot be shown, the refined answer is the
    plain one.

    Raises TypeError or ValueError, before the model runs, for arguments that do not fit, an unreadable image included.
    Source: CARVE, arXiv 2509.06461.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        preset: str | Preset | Mapping[str, Any] | None = None,
        profile: str | os.PathLike[str] | Mapping[str, Any] | bool | None = None,
        backend: str = "auto",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        self.model, self.processor, self.backend = model, processor, backend
        self.max_image_pixels = checks.integer("max_image_pixels", max_image_pixels, low=1)
        self.preset = _preset(unwrap(model), preset, profile)
        self.layers = self.preset.layers_of(len(decoder_layers(model)))
        weights = self.preset.layer_weights
        if weights is not None and len(weights) != len(self.layers):
            raise ValueError(f"layer_weights: expected one for each of layers {list(self.layers)}, got {weights!r}")

    def __call__(
        self,
        image: str | os.PathLike[str] | Image.Image,
        question: str,
        prompt: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> CarveResult:
        preset = self.preset
        if isinstance(image, (list, tuple)):
            raise TypeError(
                f"image: expected one image, got {len(image)}; choose one, as in engine(images[0], question)"
            )
        checks.text("question", question)
        if prompt is not None:
            checks.text("prompt", prompt)
            if preset.images != "refined":
                raise ValueError(
                    f"prompt: expected None where the last question shows two images (images={preset.images!r}), since "
                    f"one prompt cannot hold one image and then two; got {checks.describe(prompt)}"
                )
        original = open_image(image, self.max_image_pixels)
        asked = self._prompt(question) if prompt is None else prompt
        inputs = self._inputs([original], asked)
        layout = layout_of(self.model, self.processor, inputs, [original])
        general_inputs = self._inputs([original], self._prompt(preset.general_prompt))
        general_layout = layout_of(self.model, self.processor, general_inputs, [original])

        clock = _Clock(on_progress)
        with clock.stage("task"):
            task = self._look(inputs, layout, preset.rows, preset.max_new_tokens)
        with clock.stage("general"):
            # The word of a question need not stand in the general instruction: its tokens together take its place.
            rows = "question" if isinstance(preset.rows, tuple) and preset.rows[0] == "word" else preset.rows
            steps = 1 if preset.steps == "t_start" else preset.max_new_tokens
            general = self._look(general_inputs, general_layout, rows, steps)
        with clock.stage("carve"):
            views = layout.views[0]
            outcome = carve(
                original,
                _by_step(task.maps).cpu(),
                _by_step(general.maps).cpu(),
                grid=[view.grid for view in views] if len(views) > 1 else views[0].grid,
                box=[view.box for view in views] if len(views) > 1 else views[0].box,
                preset=preset,
                backend=self.backend,
            )
        with clock.stage("answer"):
            ids, answer, reason = self._answer(original, outcome, question, asked, task)
        clock.finish()
        return CarveResult(
            question=question,
            prompt=asked,
            answer=task.answer,
            refined_answer=answer,
            image=original,
            refined=outcome.refined,
            task=task.maps,
            general=general.maps,
            saliency=outcome.saliency,
            regions=outcome.regions,
            entropy=_entropy(task.maps, preset.steps),
            complexity=complexity(original),
            seconds={
                **{name: clock.seconds[name] for name in ("task", "general")},
                **outcome.seconds,
                "answer": clock.seconds["answer"],
            },
            preset=preset,
            reason=reason,
            answer_ids=task.ids,
            refined_ids=ids,
        )

    def _answer(
        self, original: Image.Image, outcome: CarveOutcome, question: str, asked: str, task: _Look
    ) -> tuple[tuple[int, ...], str, str | None]:
        """The refined answer as ids and text, and why it is the plain one, or None."""
        alone = self.preset.images == "refined"
        if alone and outcome.reason is not None:
            return task.ids, task.answer, outcome.reason
        try:
            if alone:
                inputs = self._inputs([outcome.refined], asked)
            else:
                inputs = self._inputs([original, outcome.refined], self._prompt(question, 2))
        except ValueError as error:
            # A crop may be thinner than a processor takes; the looks that led to it are not thrown away.
            return task.ids, task.answer, f"the refined image cannot be shown to the model: {error}"
        return *self._generate(inputs, self.preset.max_new_tokens), outcome.reason

    def _prompt(self, text: str, images: int = 1) -> str:
        return build_prompt(self.processor, text + self.preset.suffix, images)

    def _inputs(self, images: list[Image.Image], prompt: str) -> Any:
        return prepare(self.processor, images, prompt, unwrap(self.model).device, self.preset.max_pixels)

    def _look(self, inputs: Any, layout: VisualLayout, rows: Any, max_new_tokens: int) -> _Look:
        with capture_attention(
            self.model,
            layers=self.layers,
            rows=rows,
            tokens=layout,
            processor=self.processor,
            max_steps=max_new_tokens,
            backend=self.backend,
        ) as session:
            ids, answer = self._generate(inputs, max_new_tokens)
            return _Look(ids, answer, session.maps)

    def _generate(self, inputs: Any, max_new_tokens: int) -> tuple[tuple[int, ...], str]:
        config = copy.deepcopy(unwrap(self.model).generation_config)
        config.update(
            do_sample=False, num_beams=1, num_return_sequences=1, max_new_tokens=max_new_tokens, max_length=None
        )
        config.update(**dict.fromkeys(_SAMPLING))
        with torch.no_grad(), _positions_kept(unwrap(self.model)):
            output = self.model.generate(**inputs, generation_config=config)
        sequence = getattr(output, "sequences", output)[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.decode(sequence, skip_special_tokens=True)
        return tuple(sequence.tolist()), answer.strip()


@contextmanager
def _positions_kept(model: Any) -> Iterator[None]:
    """Puts back what some models (Qwen's) note of the last prompt's positions: a caller may be decoding on it."""
    noted = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    try:
        yield
    finally:
        for module, deltas in noted:
            module.rope_deltas = deltas


class _Clock:
    """Times the stages and reports them."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._report = on_progress or (lambda stage, done, total: None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._report(name, STAGES.index(name), len(STAGES))
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def finish(self) -> None:
        self._report("done", len(STAGES), len(STAGES))


def _preset(
    model: Any,
    preset: str | Preset | Mapping[str, Any] | None,
    profile: str | os.PathLike[str] | Mapping[str, Any] | bool | None,
) -> Preset:
    if preset is not None:
        return Preset.of(preset)
    if isinstance(profile, bool):
        if profile:
            raise TypeError("profile: expected a dict, the path of a carve.json, None or False, got True")
        return Preset.paper()
    if isinstance(profile, Mapping):
        return Preset.from_dict(profile)
    if profile is not None:
        path = Path(profile)
        if not path.is_file():
            raise ValueError(f"profile: expected the path of a carve.json, got {path}, which is no file")
        found = profile_of(path)
    else:
        found = profile_of(model.name_or_path) if model.name_or_path else None
    return Preset.paper() if found is None else Preset.from_dict(found)


def _by_step(maps: AttentionMaps) -> torch.Tensor:
    """The maps of batch row 0 as [L, T, N] up to its last step, the mean over the rows that each step has."""
    count = maps.last_step(0) + 1
    values, valid = maps.values[0, :, :count], maps.valid[0, :, :count]
    return values.sum(2) / valid.sum(2).clamp(min=1).unsqueeze(-1)


def _entropy(maps: AttentionMaps, steps: str) -> dict[int, float]:
    """H / ln N of each layer at the steps that are read, the mean where there are several."""
    end = maps.last_step(0) + 1
    chosen = slice(0, 1) if steps == "t_start" else slice(end - 1, end) if steps == "t_end" else slice(0, end)
    values, valid = maps.entropy[0, :, chosen].flatten(1), maps.valid[0, :, chosen].flatten(1)
    mean = values.sum(1) / valid.sum(1).clamp(min=1)
    return {layer: float(value) for layer, value in zip(maps.layers, mean, strict=True)}
