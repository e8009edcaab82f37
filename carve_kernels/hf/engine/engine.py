"""CarveEngine: answer, contrast the attention maps, keep the salient part of the image, answer again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch

from carve_kernels import checks, deprecation
from carve_kernels.backends import BACKENDS
from carve_kernels.hf import names, processors
from carve_kernels.hf.decoding import exclusive, sequential_reason
from carve_kernels.hf.decoding.recurrent import state_bytes
from carve_kernels.hf.engine import batching
from carve_kernels.hf.engine.cache import Memory, memory_of
from carve_kernels.hf.engine.passes import Job, Setup, first_pass, second_pass
from carve_kernels.hf.engine.requests import ImageSource, ImageSources, Refine, Request, make_request
from carve_kernels.hf.engine.result import CarveFailure, CarveResult
from carve_kernels.hf.engine.video import VideoResult, VideoSource, answer_video, make_video_request
from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS, bare_prompts
from carve_kernels.hf.loading import resolve_preset
from carve_kernels.hf.model import (
    attention_modules,
    check_decoder,
    check_steady,
    decoder_layers,
    input_device,
    text_backbone,
    unwrap,
)
from carve_kernels.hf.session import contract
from carve_kernels.presets import FITS, Preset

Many = list[Any] | tuple[Any, ...]
OnProgress = Callable[[str, int, int], None]
_LOG = logging.getLogger("carve_kernels")
STAGES = ("first pass", "carve", "second pass")


class CarveEngine:
    """CARVE on a model: engine(image, question) -> CarveResult.

    ================  =================================================================================================
    argument          meaning
    ================  =================================================================================================
    model             a transformers model that takes images and text, see docs/families.md
    processor         its processor
    preset            "paper", "release", a Preset or a dict of its fields; None takes the profile, or "paper"
    profile           a dict, or the path of a carve.json: which rows and layers of this model react to the question.
                      None takes the carve.json in the model's directory, if there is one; False takes none
    backend           the backend that captures, contrasts and finds regions
    max_image_pixels  the largest number of pixels of an image
    memory            what is cached between questions: None caches general maps and the prefix caches of the last
                      images within bounds; False caches nothing; a folder's path also stores maps there; or a Memory
    plain             whether to compute the plain answer; without it `answer` is empty, and maps of the first step only
                      (`t_start`, rows of the prompt) run no layer after the last captured one
    fit               how an image is shown to a processor that would crop it (LLaVA's centre crop): None crops; "pad"
                      pastes the original, and then the refined image, on a canvas of the processor's mean colour
                      that is shown whole. Maps, boxes and masks are in pixels of the image
    ================  =================================================================================================

    Calling it: `image` is a path or a PIL image; `question` a text; `prompt`, if given, the whole text that the model
    reads, with one image token, instead of the chat template's; `on_progress(stage, done, total)` is called before each
    of the stages first pass, carve and second pass, and once more at the end. Decoding is greedy under the model's own
    generation config. If the refined image is the original, or cannot be shown, the refined answer is the plain one.
    With lists of images and questions the result is a list in their order, see `stream`; `ask` takes several images of
    one question.

    The image is read once, and the question and the general instruction decode in one batch (hf/decoding);
    `sequential_reason` says why a model decodes one prompt after the other, or is None. A model serves one call at a
    time: other threads wait.

    Raises TypeError or ValueError, before the model runs, for invalid arguments, including an unreadable image.
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
        processors.check(processor)
        self.model, self.processor = model, processor
        self.backend = checks.choice("backend", backend, ("auto", *BACKENDS))
        self.max_image_pixels = checks.integer("max_image_pixels", max_image_pixels, low=1)
        self.preset = resolve_preset(unwrap(model), preset, profile)
        self.layers = self.preset.layers_of(len(decoder_layers(model)), attention_modules(model))
        weights = self.preset.layer_weights
        if weights is not None and len(weights) != len(self.layers):
            raise ValueError(f"layer_weights: expected one for each of layers {list(self.layers)}, got {weights!r}")
        # Maps are in the order of the layers, weights in the order in which the preset names them.
        ordered = (
            None if weights is None else tuple(weight for _, weight in sorted(zip(self.layers, weights, strict=True)))
        )
        self._carving = replace(self.preset, layer_weights=ordered)
        self.memory = memory_of(memory)
        if not isinstance(plain, bool):
            raise TypeError(f"plain: expected True or False, got {checks.describe(plain)}")
        self.plain = plain
        self.fit: str | None = checks.choice("fit", fit, FITS)
        if (warning := bare_prompts(processor)) is not None:
            _LOG.warning("%s", warning)

    @overload
    def __call__(
        self, image: ImageSource, question: str, prompt: str | None = None, on_progress: OnProgress | None = None
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
        image: ImageSource,
        question: Many,
        prompt: str | Many | None = None,
        on_progress: batching.OnResult | None = None,
    ) -> list[CarveResult | CarveFailure]: ...

    def __call__(
        self, image: Any, question: Any, prompt: Any = None, on_progress: Callable[..., None] | None = None
    ) -> CarveResult | list[CarveResult | CarveFailure]:
        if checks.is_many(image) or checks.is_many(question):
            return batching.answer_all(self, image, question, prompt, on_progress)
        checks.function("on_progress", on_progress)
        return self._answer_one(self.request(image, question, prompt), on_progress)

    def ask(
        self,
        images: ImageSources,
        question: str,
        *,
        refine: Refine = None,
        prompt: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> CarveResult:
        """Answer one question about an image, or about several that one prompt shows in this order.

        ===========  ==================================================================================================
        argument     meaning
        ===========  ==================================================================================================
        images       an image (path or PIL image), or a list or tuple of them
        question     a text
        refine       the numbers of the images to refine: k, [k, ...] or "all"; None takes the one with the strongest
                     contrast among those with regions (`CarvedImage.strength`)
        prompt       the whole text that the model reads, with one image token for each image; None: the chat template's
        on_progress  as of a call of the engine
        ===========  ==================================================================================================

        Each image has its own contrast, of its own tokens. The second pass shows all images with the refined ones in
        place of their originals, or all originals and then the refined ones (`Preset.images`).
        """
        checks.function("on_progress", on_progress)
        try:
            request = self.request(images, question, prompt, refine)
        except (TypeError, ValueError) as error:
            # The same image is the argument `image` of a call.
            if not str(error).startswith("image: "):
                raise
            raise type(error)(f"images: {str(error).removeprefix('image: ')}") from error
        return self._answer_one(request, on_progress)

    def _answer_one(self, request: Request, on_progress: OnProgress | None) -> CarveResult:
        report = on_progress or (lambda stage, done, total: None)
        [result] = self.answer([request], lambda stage: report(stage, STAGES.index(stage), len(STAGES)))
        report("done", len(STAGES), len(STAGES))
        return result

    def ask_video(
        self,
        video: VideoSource,
        question: str,
        *,
        max_frames: int | None = None,
        fps: float | None = None,
        prompt: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> VideoResult:
        """Answer one question about a video, and again about the kept span of its frames, cropped to the kept part.

        ===========  ==================================================================================================
        argument     meaning
        ===========  ==================================================================================================
        video        a path, of which `open_video` takes frames, or a Video: then all of its frames are read
        max_frames   of a path: at most so many frames, None = 32; `fps`: so many for each second
        prompt       the whole text that the model reads, with one video token; None: the chat template's
        ===========  ==================================================================================================

        The contrast of all frames is one, `Preset.keep` is a share of the pixels of all of them, and regions go on from
        a frame to the next one. Nothing of a video is cached.
        """
        checks.function("on_progress", on_progress)
        report = on_progress or (lambda stage, done, total: None)
        check_steady(self.model)
        request = make_video_request(
            self.model, self.processor, self.preset, video, question, prompt, self.fit, max_frames=max_frames, fps=fps,
            max_image_pixels=self.max_image_pixels,
        )  # fmt: skip
        with exclusive(self.model):
            setup = Setup(
                self.model, self.processor, self.preset, self._carving, self.layers,
                backend=self.backend, memory=None, plain=self.plain, fit=None,
            )  # fmt: skip
            result = answer_video(setup, request, lambda stage: report(stage, STAGES.index(stage), len(STAGES)))
        report("done", len(STAGES), len(STAGES))
        return result

    def stream(
        self,
        images: ImageSource | Iterable[ImageSources],
        questions: str | Iterable[str],
        prompts: str | Iterable[str | None] | None = None,
        *,
        tokens: int | None = None,
        on_progress: batching.OnResult | None = None,
    ) -> Iterator[CarveResult | CarveFailure]:
        """The results of many images and questions, in order, each as soon as it is ready; see `batching.stream`."""
        return batching.stream(self, images, questions, prompts, tokens=tokens, on_progress=on_progress)

    @property
    def sequential_reason(self) -> str | None:
        """Why prompts are decoded one by one on this model, or None where tree decoding is possible."""
        return sequential_reason(self.model)

    apart = deprecation.renamed_attribute("apart", "sequential_reason")

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return input_device(self.model)

    @property
    def bytes_per_token(self) -> int:
        """The bytes of keys and values of one token in all layers that attend."""
        backbone = text_backbone(self.model)
        return len(attention_modules(self.model)) * names.key_value_size(backbone.config) * backbone.dtype.itemsize

    @property
    def bytes_per_prompt(self) -> int:
        """The bytes of a prompt's states in recurrent and convolution layers, which do not grow with its tokens."""
        return state_bytes(self.model)

    def request(self, image: ImageSources, question: str, prompt: str | None = None, refine: Refine = None) -> Request:
        """Check an image, or several, and a question, open and process the images; the model does not run."""
        check_steady(self.model)
        return make_request(
            self.model, self.processor, self.preset, image, question, prompt, self.max_image_pixels, self.fit, refine
        )

    def answer(self, requests: Sequence[Request], on_stage: Callable[[str], None] | None = None) -> list[CarveResult]:
        """Answer requests in one batch; `on_stage` is called with the name of each stage before it.

        An exception fails the whole batch. Waits while another thread decodes on the model.
        """
        if not requests:
            return []
        report = on_stage or (lambda stage: None)
        with exclusive(self.model):
            setup = Setup(
                self.model, self.processor, self.preset, self._carving, self.layers,
                backend=self.backend, memory=self.memory, plain=self.plain, fit=self.fit,
            )  # fmt: skip
            jobs = [Job(request) for request in requests]
            report("first pass")
            first_pass(setup, jobs)
            report("carve")
            for job in jobs:
                job.carve(setup)
            setup.free_prefixes(jobs)
            report("second pass")
            second_pass(setup, [job for job in jobs if job.second])
            setup.cache_prefixes(jobs)
            return [job.result(setup) for job in jobs]
