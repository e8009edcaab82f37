"""What is asked: a picture and a question as the model takes them, and the last question about what was kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from carve_kernels import checks
from carve_kernels.hf.image_features import Pictures, Shown
from carve_kernels.hf.inputs import build_prompt, open_image
from carve_kernels.hf.layouts import check_processor, layout_of
from carve_kernels.hf.layouts.letterbox import Letterbox
from carve_kernels.hf.model import input_device
from carve_kernels.presets import Preset
from carve_kernels.types import VisualLayout


class Prompt(NamedTuple):
    """A prompt of one picture as the model takes it; `head` is how many columns the picture and what is before need."""

    text: str
    inputs: dict[str, Any]
    layout: VisualLayout
    head: int

    @property
    def ids(self) -> tuple[int, ...]:
        """The head's tokens."""
        return tuple(self.inputs["input_ids"][0, : self.head].tolist())


@dataclass(frozen=True, eq=False)
class Request:
    """One picture and one question, opened, checked and through the processor; `tokens` is what a cache must hold."""

    image: Image.Image
    question: str
    task: Prompt
    general: Prompt
    shown: Shown
    pictures: Pictures
    tokens: int

    @property
    def entries(self) -> Mapping[str, Any]:
        """What the processor made of the picture, made anew where an earlier answer has let go of it."""
        return self.shown.entries or self.pictures.inputs([self.image], self.task.text)[1].entries


class Final(NamedTuple):
    """A last question: its prompt, all of its pictures, and the last one alone where they can be told apart.

    `refined` is that picture, None where it is the original.
    """

    inputs: dict[str, Any]
    shown: Shown
    last: Shown | None
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
    """Check a picture and a question, open them and run the processor; the model does not run."""
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
    pictures = Pictures(processor, input_device(model), preset.max_pixels, letterbox)
    asked = build_prompt(processor, question + preset.suffix) if prompt is None else prompt
    inputs, shown = pictures.inputs([original], asked)
    task = located(model, processor, original, asked, inputs, shown.entries, letterbox)
    instruction = build_prompt(processor, preset.general_prompt + preset.suffix)
    inputs, same = pictures.inputs([original], instruction)
    general = located(model, processor, original, instruction, inputs, same.entries, letterbox)
    if preset.images == "refined":
        pictures.forget()
    tokens = sum(each.inputs["input_ids"].shape[1] + preset.max_new_tokens for each in (task, general))
    return Request(original, question, task, general, shown, pictures, tokens)


def make_final(processor: Any, preset: Preset, request: Request, refined: Image.Image, same: bool) -> Final:
    """The last question about a refined image, which may be the `same` as the original.

    Raises ValueError if the processor refuses the refined image.
    """
    pictures = request.pictures
    if preset.images == "refined":
        inputs, shown = pictures.inputs([refined], request.task.text)
        return Final(inputs, shown, None, refined)
    text = build_prompt(processor, request.question + preset.suffix, 2)
    inputs, shown = pictures.inputs([request.image, refined], text)
    last = pictures.alone(refined)
    return Final(inputs, shown, request.shown if last is not None and same else last, None if same else refined)


def located(
    model: Any,
    processor: Any,
    image: Image.Image,
    text: str,
    inputs: dict[str, Any],
    entries: Mapping[str, Any],
    letterbox: Letterbox | None = None,
) -> Prompt:
    """What `Pictures.inputs` made of a prompt, with the places of its visual tokens."""
    whole = {**inputs, **entries}
    layout = letterbox.layout(whole, image) if letterbox else layout_of(model, processor, whole, [image])
    return Prompt(text, inputs, layout, int(layout.tokens().max()) + 1)
