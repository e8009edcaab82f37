"""Requests: images and a question, loaded, checked and processed, and the prompts that are made of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from carve_kernels import checks
from carve_kernels.hf.image_inputs import ImageFeatures, ImageInputs
from carve_kernels.hf.inputs import build_prompt, images_in, open_image
from carve_kernels.hf.layouts import check_processor, layout_of
from carve_kernels.hf.layouts.letterbox import Letterbox
from carve_kernels.hf.processors import image_token
from carve_kernels.presets import Preset
from carve_kernels.types import VisualLayout

ImageSource = str | os.PathLike[str] | Image.Image
ImageSources = ImageSource | list[ImageSource] | tuple[ImageSource, ...]
Refine = None | str | int | Iterable[int]
"""Which images are refined: the one with the strongest contrast (None), "all", or those of these numbers."""


class Prompt(NamedTuple):
    """A prompt about images as the model takes it; `prefix_length` counts its tokens up to the last of the images."""

    text: str
    inputs: dict[str, Any]
    layout: VisualLayout
    prefix_length: int

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return tuple(self.inputs["input_ids"][0, : self.prefix_length].tolist())


@dataclass(frozen=True, eq=False)
class Request:
    """Images and a question about them after loading, checks and processing.

    `refine` has the numbers of the images to refine, None where their contrasts decide; `tokens` is the KV-cache length
    that the request needs.
    """

    images: tuple[Image.Image, ...]
    question: str
    task: Prompt
    general: Prompt
    features: ImageFeatures
    image_inputs: ImageInputs
    tokens: int
    refine: tuple[int, ...] | None


class SecondPrompt(NamedTuple):
    """The prompt of the second pass: all of its images, and those after the originals alone if they can be separated.

    `images` is empty where it shows the same images as the first prompt, and nothing else.
    """

    inputs: dict[str, Any]
    features: ImageFeatures
    later_images: ImageFeatures | None
    images: tuple[Image.Image, ...]


def make_request(
    model: Any,
    processor: Any,
    preset: Preset,
    images: ImageSources,
    question: str,
    prompt: str | None,
    max_image_pixels: int,
    fit: str | None = None,
    refine: Refine = None,
) -> Request:
    """Check images and a question, open the images and run the processor; the model does not run."""
    check_texts(question, prompt, preset, "images")
    sources = list(images) if isinstance(images, (list, tuple)) else [images]
    if not sources:
        raise ValueError(f"images: expected at least one image, got {checks.describe(images)}")
    chosen = chosen_images(refine, len(sources))
    check_processor(model, processor)
    if prompt is not None and (given := images_in(processor, prompt, len(sources))) != len(sources):
        raise ValueError(
            f"prompt: expected {image_token(processor)!r} for each of {len(sources)} image(s), got {given} in "
            + checks.describe(prompt)
        )
    originals = [open_image(sources[0], max_image_pixels)] if len(sources) == 1 else _opened(sources, max_image_pixels)
    letterbox = None if fit is None else Letterbox(model, processor, max_image_pixels)
    prepare_image = None if letterbox is None else letterbox.pad
    image_inputs = ImageInputs.for_model(model, processor, preset.max_pixels, prepare_image)

    def locate(text: str) -> tuple[Prompt, ImageFeatures]:
        inputs, features = image_inputs.inputs(originals, text)
        return locate_prompt(model, processor, originals, text, inputs, features, letterbox), features

    count = len(originals)
    task, features = locate(build_prompt(processor, question + preset.suffix, count) if prompt is None else prompt)
    general, _ = locate(build_prompt(processor, preset.general_prompt + preset.suffix, count))
    if preset.images == "refined" and count == 1:
        image_inputs.clear()
    tokens = sum(each.inputs["input_ids"].shape[1] + preset.max_new_tokens for each in (task, general))
    return Request(tuple(originals), question, task, general, features, image_inputs, tokens, chosen)


def check_texts(question: str, prompt: str | None, preset: Preset, visuals: str) -> None:
    """Check a question, and the prompt that a user wrote for the images or videos (`visuals`) of both passes."""
    checks.text("question", question)
    if prompt is None:
        return
    checks.text("prompt", prompt)
    if preset.images != "refined":
        raise ValueError(
            f"prompt: expected None where the last question shows more {visuals} than the first "
            f"(images={preset.images!r}), since one prompt cannot hold both; got {checks.describe(prompt)}"
        )


def make_second_prompt(
    processor: Any, preset: Preset, request: Request, refined: Mapping[int, Image.Image], are_original: bool
) -> SecondPrompt:
    """The second prompt of a request about some refined images, by number; `are_original`: they equal the originals.

    Refined images are in place of the originals, or all originals come first and the refined ones after them.

    Raises ValueError if the processor refuses a refined image.
    """
    image_inputs = request.image_inputs
    if preset.images == "refined":
        displayed = [refined.get(number, original) for number, original in enumerate(request.images)]
        return SecondPrompt(*image_inputs.inputs(displayed, request.task.text), None, tuple(displayed))
    later_images = [refined[number] for number in sorted(refined)]
    displayed = [*request.images, *later_images]
    text = build_prompt(processor, request.question + preset.suffix, len(displayed))
    inputs, features = image_inputs.inputs(displayed, text)
    later = image_inputs.subset(later_images)
    if later is not None and are_original and len(later_images) == len(request.images):
        later = request.features
    return SecondPrompt(inputs, features, later, () if are_original else tuple(displayed))


def locate_prompt(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    text: str,
    inputs: dict[str, Any],
    features: ImageFeatures,
    letterbox: Letterbox | None = None,
) -> Prompt:
    """A prompt with the positions of its visual tokens, from what `ImageInputs.inputs` returned."""
    known = {**features.dropped, **features.entries, **inputs}
    layout = letterbox.layout(known, images) if letterbox else layout_of(model, processor, known, [list(images)])
    return Prompt(text, inputs, layout, int(layout.tokens().max()) + 1)


def chosen_images(refine: Refine, count: int) -> tuple[int, ...] | None:
    """The numbers of the images to refine, ascending, out of so many; None where their contrasts decide."""
    expected = f"expected None, 'all', or numbers of images from 0 to {count - 1}"
    if refine is None:
        return (0,) if count == 1 else None
    if isinstance(refine, str):
        if refine != "all":
            raise ValueError(f"refine: {expected}, got {refine!r}")
        return tuple(range(count))
    listed = checks.plain(refine)
    numbers = list(listed) if isinstance(listed, (list, tuple, range, set)) else [listed]
    plain = [checks.plain(number) for number in numbers]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in plain):
        raise TypeError(f"refine: {expected}, got {checks.describe(refine)}")
    if not plain or not all(0 <= number < count for number in plain) or len(set(plain)) < len(plain):
        raise ValueError(f"refine: {expected}, each once, got {checks.describe(refine)}")
    return tuple(sorted(plain))


def _opened(sources: Sequence[ImageSource], max_image_pixels: int) -> list[Image.Image]:
    """Several images, opened; an error says which one it is about."""
    images = []
    for index, source in enumerate(sources):
        try:
            images.append(open_image(source, max_image_pixels))
        except (ValueError, TypeError) as error:
            raise type(error)(f"images[{index}]: {str(error).removeprefix('image: ')}") from error
    return images
