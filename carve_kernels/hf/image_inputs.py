"""Each image goes through the image processor and the vision tower once, whichever prompts show it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from carve_kernels.hf import names
from carve_kernels.hf.inputs import prepare
from carve_kernels.hf.model import input_device, text_backbone, unwrap
from carve_kernels.hf.processors import is_for_training, is_pixels, is_text, lacks_token_types

# What image processors return that treat each image separately and concatenate the results.
_SEPARATE = (
    {"pixel_values"},
    {"pixel_values", "grids"},
    {"pixel_values", "image_grid_thw"},
    {"pixel_values", "num_crops"},
    {"pixel_values", "num_patches"},
)

PrepareImage = Callable[[Image.Image], Image.Image]


class ImageFeatures:
    """What a processor returned for one or several images, and the vision tower's results once a prompt needed them.

    `dropped` is what its image processor returned besides: layouts read it, models do not take it.
    """

    def __init__(self, process: Callable[[], Mapping[str, Any]], dropped: Mapping[str, Any] | None = None) -> None:
        self._process = process
        self._entries: Mapping[str, Any] | None = process()
        self._results: dict[str, Any] | None = None
        self.dropped: Mapping[str, Any] = dropped or {}

    @property
    def entries(self) -> Mapping[str, Any]:
        """The processor's entries for the images; computed again after `free`."""
        return self._process() if self._entries is None else self._entries

    def for_model(self, model: Any) -> dict[str, Any]:
        """The arguments of the model's forward; the vision tower has run if the model takes its results."""
        if self._results is None:
            results = names.image_features(model, self.entries)
            if results is None:
                return dict(self.entries)
            self._results = results
        return self._results

    def free(self) -> None:
        """Drop the processor's entries if the vision tower's results are there."""
        if self._results is not None:
            self._entries = None


class ImageInputs:
    """Model inputs of prompts about the same images, by a processor that is not changed.

    `prepare_image` is applied to each image before the processor, once. Pixels get the dtype `dtype`, since not every
    vision tower converts them itself; None leaves them. `token_types` asks the processor for the types of tokens.
    """

    def __init__(
        self,
        processor: Any,
        device: torch.device,
        max_pixels: int | None,
        prepare_image: PrepareImage | None = None,
        dtype: torch.dtype | None = None,
        token_types: bool = False,
    ) -> None:
        self._image_processor = _CachingImageProcessor(processor.image_processor)
        self._processor = copy.copy(processor)
        self._processor.image_processor = self._image_processor
        self._device, self._max_pixels, self._dtype = device, max_pixels, dtype
        self._prepare_image, self._token_types = prepare_image, token_types
        self._prepared: list[tuple[Image.Image, Image.Image]] = []
        self._entries: set[str] = set()

    @classmethod
    def for_model(
        cls, model: Any, processor: Any, max_pixels: int | None, prepare_image: PrepareImage | None = None
    ) -> ImageInputs:
        """Inputs on the model's device, as it takes them."""
        token_types = lacks_token_types(processor, unwrap(model))
        return cls(processor, input_device(model), max_pixels, prepare_image, pixel_dtype(model), token_types)

    def inputs(self, images: list[Image.Image], prompt: str) -> tuple[dict[str, Any], ImageFeatures]:
        """The processor's entries for a prompt without pixels (grids stay: positions need them), and its images."""
        inputs = self._process(images, prompt)
        without_pixels = {name: value for name, value in inputs.items() if not is_pixels(name)}
        self._entries = set(inputs)
        dropped = {name: value for name, value in self._image_processor.returned.items() if name not in inputs}
        first: list[Any] = [inputs]

        def process() -> dict[str, Any]:
            entries = first.pop() if first else self._process(images, prompt)
            return {name: value for name, value in entries.items() if not is_text(name)}

        return without_pixels, ImageFeatures(process, dropped)

    def subset(self, images: Sequence[Image.Image]) -> ImageFeatures | None:
        """Some of the images of the last prompt; None if the processor computes something from all of them together."""
        entries = self._image_processor.entries_of([self._prepare(image) for image in images])
        if entries is None:
            return None
        kept = {name: value for name, value in entries.items() if name in self._entries}
        on_device = moved(kept, self._device, self._dtype)
        return ImageFeatures(lambda: on_device)

    def clear(self) -> None:
        """Drop what the processor returned for the images."""
        self._image_processor.cached.clear()
        self._prepared.clear()

    def _process(self, images: list[Image.Image], prompt: str) -> dict[str, Any]:
        prepared = [self._prepare(image) for image in images]
        inputs = prepare(self._processor, prepared, prompt, None, self._max_pixels, self._token_types)
        return moved(
            {name: value for name, value in inputs.items() if not is_for_training(name)}, self._device, self._dtype
        )

    def _prepare(self, image: Image.Image) -> Image.Image:
        """The prepared image, the same object each time: the cache of the image processor goes by identity."""
        if self._prepare_image is None:
            return image
        for original, prepared in self._prepared:
            if original is image:
                return prepared
        self._prepared.append((image, self._prepare_image(image)))
        return self._prepared[-1][1]


def pixel_dtype(model: Any) -> torch.dtype:
    """The dtype of the weights that read pixels: those outside of the text decoder, where they are first."""
    inner: Any = unwrap(model)
    text = {id(parameter) for parameter in text_backbone(model).parameters()}
    others = (parameter.dtype for parameter in inner.parameters() if id(parameter) not in text)
    return next((dtype for dtype in others if dtype.is_floating_point), inner.dtype)


class _CachingImageProcessor:
    """An image processor that is called once for each image; `returned` is the whole result of the last call."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.cached: list[tuple[Image.Image, dict[str, Any], Any]] = []
        self.returned: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, *args: Any, **settings: Any) -> Any:
        result = self._result(images, args, settings)
        # Processors take entries out of the result.
        self.returned = dict(result)
        return type(result)(dict(result))

    def entries_of(self, images: Sequence[Image.Image]) -> dict[str, Any] | None:
        """The entries of some images, if images are processed separately."""
        results = []
        for image in images:
            known = [result for cached, _, result in self.cached if cached is image]
            if not known:
                return None
            results.append(known[-1])
        return _concatenate(results)

    def _result(self, images: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        flat = _flatten(images)
        if args or not flat:
            return self._processor(images, *args, **settings)
        nested = isinstance(images, list) and isinstance(images[0], list)
        first = self._process(flat[0], nested, settings)
        if len(flat) == 1:
            return first
        if _concatenate([first]) is None:
            return self._processor(images, **settings)
        concatenated = _concatenate([first, *(self._process(image, nested, settings) for image in flat[1:])])
        return self._processor(images, **settings) if concatenated is None else type(first)(concatenated)

    def _process(self, image: Image.Image, nested: bool, settings: dict[str, Any]) -> Any:
        for cached, cached_settings, result in self.cached:
            if cached is image and cached_settings == settings:
                return result
        result = self._processor([[image]] if nested else [image], **settings)
        self.cached.append((image, settings, result))
        return result


def _flatten(images: Any) -> list[Image.Image] | None:
    """The images of one prompt, given as one, a list, or a list in a list; None for anything else."""
    flat = images if isinstance(images, list) else [images]
    if len(flat) == 1 and isinstance(flat[0], list):
        flat = flat[0]
    return flat if all(isinstance(image, Image.Image) for image in flat) else None


def _concatenate(results: list[Any]) -> dict[str, Any] | None:
    """Several images one after the other, as their processor would return them; None if it does otherwise."""
    first = dict(results[0])
    pixels = [result["pixel_values"] for result in results if isinstance(result.get("pixel_values"), torch.Tensor)]
    if set(first) not in _SEPARATE or len(pixels) < len(results):
        return None
    if any(each.shape[1:] != pixels[0].shape[1:] for each in pixels):
        return None
    if "image_grid_thw" not in first and pixels[0].ndim != 4:
        return None
    if set(first) == {"pixel_values"} and any(len(each) != 1 for each in pixels):
        return None
    if not all(isinstance(result[name], (torch.Tensor, list)) for result in results for name in first):
        return None
    return {name: _joined([result[name] for result in results]) for name in first}


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else [item for value in values for item in value]


def moved(inputs: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Entries of a processor on a device, the pixels in a dtype."""
    return {name: _to(value, device, dtype if is_pixels(name) else None) for name, value in inputs.items()}


def _to(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A tensor, or tensors in lists, on a device; floating-point ones in a dtype, unless it is None."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return [_to(item, device, dtype) for item in value] if isinstance(value, (list, tuple)) else value
