"""Requests: an image and a question as the model takes them, and the prompt of the second pass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from carve_kernels import checks
from carve_kernels.hf.image_features import ImageFeatures, ImageInputs
from carve_kernels.hf.inputs import build_prompt, open_image
from carve_kernels.hf.layouts import check_processor, layout_of
from carve_kernels.hf.layouts.letterbox import Letterbox
from carve_kernels.hf.model import input_device
from carve_kernels.presets import Preset
from carve_kernels.types import VisualLayout


class Prompt(NamedTuple):
    """A prompt about one image as the model takes it; `prefix_length` counts its tokens up to the last of the image."""

    text: str
    inputs: dict[str, Any]
    layout: VisualLayout
    prefix_length: int

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return tuple(self.inputs["input_ids"][0, : self.prefix_length].tolist())


@dataclass(frozen=True, eq=False)
class Request:
    """One image and one question, opened, checked and processed; `tokens` is what a KV cache must hold for it."""

    image: Image.Image
    question: str
    task: Prompt
    general: Prompt
    features: ImageFeatures
    image_inputs: ImageInputs
    tokens: int


class SecondPrompt(NamedTuple):
    """The prompt of the second pass: all of its images, and the last one alone if it can be separated.

    `refined` is the last image, None where that is the original.
    """

    inputs: dict[str, Any]
    features: ImageFeatures
    later_images: ImageFeatures | None
    refined: Image.Image | None


def make_request(
    model: Any,
    processor: Any,
    preset: Preset,
    image: str | os.PathLike[str] | Image.Image,
    question: str,
    prompt: str | None,
    max_image_pixels: int,
    fit: str | None = None,
) -> Request:
    """Check an image and a question, open the image and run the processor; the model does not run."""
    checks.text("question", question)
    if prompt is not None:
        checks.text("prompt", prompt)
        if preset.images != "refined":
            raise ValueError(
                "prompt: expected None where the last question shows two images "
                f"(images={preset.images!r}), since one prompt cannot hold one image and then two; "
                f"got {checks.describe(prompt)}"
            )
    check_processor(model, processor)
    original = open_image(image, max_image_pixels)
    letterbox = Letterbox.of(fit, model, processor, max_image_pixels)
    image_inputs = ImageInputs(
        processor, input_device(model), preset.max_pixels, None if letterbox is None else letterbox.laid
    )

    def locate(text: str) -> tuple[Prompt, ImageFeatures]:
        inputs, features = image_inputs.inputs([original], text)
        return locate_prompt(model, processor, original, text, inputs, features.entries, letterbox), features

    task, features = locate(build_prompt(processor, question + preset.suffix) if prompt is None else prompt)
    general, _ = locate(build_prompt(processor, preset.general_prompt + preset.suffix))
    if preset.images == "refined":
        image_inputs.clear()
    tokens = sum(each.inputs["input_ids"].shape[1] + preset.max_new_tokens for each in (task, general))
    return Request(original, question, task, general, features, image_inputs, tokens)


def make_second_prompt(
    processor: Any, preset: Preset, request: Request, refined: Image.Image, is_original: bool
) -> SecondPrompt:
    """The second prompt of a request about a refined image.

    Raises ValueError if the processor refuses the refined image.
    """
    image_inputs = request.image_inputs
    if preset.images == "refined":
        return SecondPrompt(*image_inputs.inputs([refined], request.task.text), None, refined)
    text = build_prompt(processor, request.question + preset.suffix, 2)
    inputs, features = image_inputs.inputs([request.image, refined], text)
    later = image_inputs.single(refined)
    if later is not None and is_original:
        later = request.features
    return SecondPrompt(inputs, features, later, None if is_original else refined)


def locate_prompt(
    model: Any,
    processor: Any,
    image: Image.Image,
    text: str,
    inputs: dict[str, Any],
    entries: Mapping[str, Any],
    letterbox: Letterbox | None = None,
) -> Prompt:
    """A prompt with the positions of its visual tokens, from what `ImageInputs.inputs` returned."""
    all_inputs = {**inputs, **entries}
    layout = letterbox.layout(all_inputs, image) if letterbox else layout_of(model, processor, all_inputs, [image])
    return Prompt(text, inputs, layout, int(layout.tokens().max()) + 1)
