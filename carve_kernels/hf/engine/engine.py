"""CarveEngine: ask, see where the model looks, keep that part of the image, ask again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from PIL import Image

from carve_kernels import checks
from carve_kernels.backends import BACKENDS
from carve_kernels.complexity import complexity
from carve_kernels.hf import names
from carve_kernels.hf.decoding.support import obstacle
from carve_kernels.hf.decoding.tree_decoder import Outcome, alone
from carve_kernels.hf.engine import batching
from carve_kernels.hf.engine.cache import Memory, memory_of
from carve_kernels.hf.engine.fingerprint import same_pixels
from carve_kernels.hf.engine.passes import Looker, Seen, needed
from carve_kernels.hf.engine.requests import Final, Request, make_final, make_request
from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS
from carve_kernels.hf.layouts.letterbox import FITS
from carve_kernels.hf.loading import preset_of
from carve_kernels.hf.model import check_decoder, check_steady, decoder_layers, text_backbone, unwrap
from carve_kernels.hf.session import contract
from carve_kernels.maps import AttentionMaps
from carve_kernels.pipeline import CarveOutcome, carve_views
from carve_kernels.presets import Preset
from carve_kernels.types import CarveFailure, CarveResult

Picture = str | os.PathLike[str] | Image.Image
Many = list[Any] | tuple[Any, ...]
OnProgress = Callable[[str, int, int], None]
STAGES = ("task", "general", "carve", "answer")


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
    memory            what is kept between questions: None keeps general maps and the prefix caches of the last pictures
                      within bounds; False keeps nothing; a folder's path keeps maps there too; or a Memory
    plain             whether the plain answer is wanted; without it `answer` is empty, and maps of the first step alone
                      (`t_start`, rows of the prompt) cost no layer behind the last one that is read
    fit               how an image is shown to a processor that would cut some of it away (LLaVA's centre crop): None
                      lets it; "pad" lays the image, and then the refined one, on a canvas of the processor's mean
                      colour that is shown whole. Maps, boxes and masks are in pixels of the image
    ================  =================================================================================================

    Calling it: `image` is a path or a PIL image; `question` a text; `prompt`, if given, the whole text that the model
    reads, with one image token, in place of the chat template's; `on_progress(stage, done, total)` is called before
    each of the stages task, general, carve and answer, and once more at the end. Decoding is greedy under the model's
    own generation config. Where the refined image is the original, or cannot be shown, the refined answer is the
    plain one. With lists of images and questions the result is a list in their order, see `stream`.

    Each picture is read once, and the question and the general instruction are answered together behind it (joint.py);
    `apart` says why a model is asked one prompt after the other instead, or is None. Of the two looks' seconds, which
    are one, each has its share of the tokens. A model serves one call at a time: a thread waits for another one that is
    at work on it.

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
        memory: Memory | str | os.PathLike[str] | bool | None = None,
        plain: bool = True,
        fit: str | None = None,
    ) -> None:
        contract.ensure()
        check_decoder(model)
        self.model, self.processor = model, processor
        self.backend = checks.choice("backend", backend, ("auto", *BACKENDS))
        self.max_image_pixels = checks.integer("max_image_pixels", max_image_pixels, low=1)
        self.preset = preset_of(unwrap(model), preset, profile)
        self.layers = self.preset.layers_of(len(decoder_layers(model)))
        weights = self.preset.layer_weights
        if weights is not None and len(weights) != len(self.layers):
            raise ValueError(f"layer_weights: expected one for each of layers {list(self.layers)}, got {weights!r}")
        # Maps come in the order of the layers, whatever the order in which a preset names them.
        ordered = (
            None if weights is None else tuple(weight for _, weight in sorted(zip(self.layers, weights, strict=True)))
        )
        self._carving = replace(self.preset, layer_weights=ordered)
        self.memory = memory_of(memory)
        if not isinstance(plain, bool):
            raise TypeError(f"plain: expected True or False, got {checks.describe(plain)}")
        self.plain = plain
        self.fit: str | None = checks.choice("fit", fit, FITS)

    @overload
    def __call__(
        self, image: Picture, question: str, prompt: str | None = None, on_progress: OnProgress | None = None
    ) -> CarveResult: ...

    @overload
    def __call__(
        self,
        image: Many,
        question: str | Many,
        prompt: str | Many | None = None,
        on_progress: batching.OnResult | None = None,
    ) -> list[CarveResult | CarveFailure]: ...

    @overload
    def __call__(
        self,
        image: Picture,
        question: Many,
        prompt: str | Many | None = None,
        on_progress: batching.OnResult | None = None,
    ) -> list[CarveResult | CarveFailure]: ...

    def __call__(
        self, image: Any, question: Any, prompt: Any = None, on_progress: Callable[..., None] | None = None
    ) -> CarveResult | list[CarveResult | CarveFailure]:
        if batching.holds_many(image) or batching.holds_many(question):
            return batching.answer_all(self, image, question, prompt, on_progress)
        request = self.request(image, question, prompt)
        clock = _Clock(on_progress)
        result = self.answer([request], clock.begin)[0]
        clock.finish()
        return result

    def stream(
        self,
        images: Picture | Iterable[Picture],
        questions: str | Iterable[str],
        prompts: str | Iterable[str | None] | None = None,
        *,
        tokens: int | None = None,
        on_progress: batching.OnResult | None = None,
    ) -> Iterator[CarveResult | CarveFailure]:
        """The results of many pictures and questions in their order, each as soon as it is there.

        See batching.py for what may be given, what runs together, and what stands in the place of a bad picture.
        """
        return batching.stream(self, images, questions, prompts, tokens=tokens, on_progress=on_progress)

    @property
    def apart(self) -> str | None:
        """Why prompts are looked at one after the other on this model as it is, or None."""
        return obstacle(self.model)

    @property
    def bytes_per_token(self) -> int:
        """The bytes of keys and values of one token in all layers."""
        backbone = text_backbone(self.model)
        return len(decoder_layers(self.model)) * names.key_value_size(backbone.config) * backbone.dtype.itemsize

    def request(self, image: Picture, question: str, prompt: str | None = None) -> Request:
        """Check a picture and a question, open them and run the processor; the model does not run."""
        check_steady(self.model)
        return make_request(
            self.model, self.processor, self.preset, image, question, prompt, self.max_image_pixels, self.fit
        )

    def answer(self, requests: Sequence[Request], on_stage: Callable[[str], None] | None = None) -> list[CarveResult]:
        """Answer requests together; `on_stage` is called with the name of each stage before it.

        An exception is about all of them. A thread waits for another one that is at work on the model.
        """
        if not requests:
            return []
        with alone(self.model):
            return self._answer(requests, on_stage or (lambda stage: None))

    def _answer(self, requests: Sequence[Request], report: Callable[[str], None]) -> list[CarveResult]:
        looker = Looker(
            self.model, self.processor, self.preset, self.layers,
            backend=self.backend, memory=self.memory, plain=self.plain, fit=self.fit,
        )  # fmt: skip
        report("task")
        report("general")
        seen = looker.first(requests)
        report("carve")
        outcomes = [self._carve(request, each) for request, each in zip(requests, seen, strict=True)]
        report("answer")
        start = time.perf_counter()
        finals = [
            self._final(request, each, outcome) for request, each, outcome in zip(requests, seen, outcomes, strict=True)
        ]
        asked = [number for number, (final, _) in enumerate(finals) if isinstance(final, Final)]
        words = looker.second(
            [requests[number] for number in asked],
            [seen[number] for number in asked],
            [final for final, _ in finals if isinstance(final, Final)],
        )
        answers = [final if isinstance(final, Outcome) else None for final, _ in finals]
        for number, outcome in zip(asked, words, strict=True):
            answers[number] = outcome
        looker.keep(seen, requests)
        seconds = (time.perf_counter() - start) / len(requests)
        return [
            self._result(request, each, outcome, answer, reason, seconds)
            for request, each, outcome, answer, (_, reason) in zip(
                requests, seen, outcomes, answers, finals, strict=True
            )
        ]

    def _carve(self, request: Request, seen: Seen) -> CarveOutcome:
        views = request.task.layout.views[0]
        return carve_views(
            request.image,
            _by_step(needed(seen.task.maps)).cpu(),
            _by_step(seen.general).cpu(),
            [view.grid for view in views],
            [view.box for view in views],
            self._carving,
            self.backend,
        )

    def _final(self, request: Request, seen: Seen, outcome: CarveOutcome) -> tuple[Final | Outcome, str | None]:
        """The last question, or its answer where that is the plain one; and why the image was kept as it was."""
        plain = seen.task if self.plain else Final(request.task.inputs, request.shown, None, None)
        same = outcome.reason is not None or same_pixels(outcome.refined, request.image)
        if self.preset.images == "refined" and same:
            return plain, outcome.reason
        try:
            return make_final(self.processor, self.preset, request, outcome.refined, same), outcome.reason
        except ValueError as error:
            # A crop may be thinner than a processor takes; the looks that led to it are not thrown away.
            return plain, f"the refined image cannot be shown to the model: {error}"

    def _result(
        self,
        request: Request,
        seen: Seen,
        outcome: CarveOutcome,
        answer: Outcome | None,
        reason: str | None,
        seconds: float,
    ) -> CarveResult:
        refined = answer.ids if answer is not None else ()
        return CarveResult(
            question=request.question,
            prompt=request.task.text,
            answer=self._decoded(seen.task.ids) if self.plain else "",
            refined_answer=self._decoded(refined),
            image=request.image,
            refined=outcome.refined,
            task=seen.task.maps,
            general=seen.general,
            saliency=outcome.saliency,
            regions=outcome.regions,
            entropy=_entropy(needed(seen.task.maps), self.preset.steps),
            seconds={**seen.seconds, **outcome.seconds, "answer": seconds},
            preset=self.preset,
            measure=complexity,
            reason=reason,
            answer_ids=seen.task.ids if self.plain else (),
            refined_ids=refined,
            unseen=request.task.layout.unseen(),
        )

    def _decoded(self, ids: tuple[int, ...]) -> str:
        answer: str = self.processor.decode(list(ids), skip_special_tokens=True)
        return answer.strip()


class _Clock:
    """Reports the stages of one question."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._report = on_progress or (lambda stage, done, total: None)

    def begin(self, stage: str) -> None:
        self._report(stage, STAGES.index(stage), len(STAGES))

    def finish(self) -> None:
        self._report("done", len(STAGES), len(STAGES))


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
