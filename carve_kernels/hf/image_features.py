"""Image inputs: each image goes through the processor once and through the vision tower once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image

from carve_kernels.hf import names
from carve_kernels.hf.inputs import prepare

# The prefix of the entries that only the vision tower reads.
_PIXELS = "pixel"
# What image processors return that treat each image separately and concatenate the results.
_SEPARATE = ({"pixel_values"}, {"pixel_values", "image_grid_thw"})

PrepareImage = Callable[[Image.Image], Image.Image]


class ImageFeatures:
    """What a processor returned for one or several images, and the vision tower's results once a prompt needed them."""

    def __init__(self, process: Callable[[], Mapping[str, Any]]) -> None:
        self._process = process
        self._entries: Mapping[str, Any] | None = process()
        self._results: dict[str, Any] | None = None

    @property
    def entries(self) -> Mapping[str, Any]:
        """The processor's entries for the images; computed again after `free`."""
        return self._process() if self._entries is None else self._entries

    def for_model(self, model: Any) -> dict[str, Any]:
        """The arguments of the model's forward; the vision tower has run if the model takes its results."""
        if self._results is None:
            results = names.tower_results(model, self.entries)
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

    `prepare_image` is applied to each image before the processor, once.
    """

    def __init__(
        self,
        processor: Any,
        device: torch.device,
        max_pixels: int | None,
        prepare_image: PrepareImage | None = None,
    ) -> None:
        self._image_processor = _CachingImageProcessor(processor.image_processor)
        self._processor = copy.copy(processor)
        self._processor.image_processor = self._image_processor
        self._device, self._max_pixels = device, max_pixels
        self._prepare_image = prepare_image
        self._prepared: list[tuple[Image.Image, Image.Image]] = []

    def inputs(self, images: list[Image.Image], prompt: str) -> tuple[dict[str, Any], ImageFeatures]:
        """The processor's entries for a prompt without pixels (grids stay: positions need them), and its images."""
        inputs = self._process(images, prompt)
        without_pixels = {name: value for name, value in inputs.items() if not name.startswith(_PIXELS)}
        first: list[Any] = [inputs]

        def process() -> dict[str, Any]:
            entries = first.pop() if first else self._process(images, prompt)
            return {name: value for name, value in entries.items() if not names.is_text(name)}

        return without_pixels, ImageFeatures(process)

    def single(self, image: Image.Image) -> ImageFeatures | None:
        """One of the images; None if the processor computes something from all of them together."""
        entries = self._image_processor.entries_of(self._prepare(image))
        if entries is None:
            return None
        on_device = {name: value.to(self._device) for name, value in entries.items()}
        return ImageFeatures(lambda: on_device)

    def clear(self) -> None:
        """Drop what the processor returned for the images."""
        self._image_processor.cached.clear()
        self._prepared.clear()

    def _process(self, images: list[Image.Image], prompt: str) -> Any:
        prepared = [self._prepare(image) for image in images]
        return prepare(self._processor, prepared, prompt, self._device, self._max_pixels)

    def _prepare(self, image: Image.Image) -> Image.Image:
        """The prepared image, the same object each time: the cache of the image processor goes by identity."""
        if self._prepare_image is None:
            return image
        for original, prepared in self._prepared:
            if original is image:
                return prepared
        self._prepared.append((image, self._prepare_image(image)))
        return self._prepared[-1][1]


class _CachingImageProcessor:
    """An image processor that is called once for each image."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.cached: list[tuple[Image.Image, dict[str, Any], Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, *args: Any, **settings: Any) -> Any:
        flat = images if isinstance(images, list) else [images]
        if args or not all(isinstance(image, Image.Image) for image in flat):
            return self._processor(images, *args, **settings)
        single = [self._process(image, settings) for image in flat]
        if len(single) == 1:
            return type(single[0])(dict(single[0]))
        concatenated = _concatenate(single)
        return self._processor(images, **settings) if concatenated is None else type(single[0])(concatenated)

    def entries_of(self, image: Image.Image) -> dict[str, Any] | None:
        """The entries of one image, if images are processed separately."""
        entries = [entries for cached, _, entries in self.cached if cached is image]
        return dict(entries[-1]) if entries and _concatenate(entries[-1:]) is not None else None

    def _process(self, image: Image.Image, settings: dict[str, Any]) -> Any:
        for cached, cached_settings, entries in self.cached:
            if cached is image and cached_settings == settings:
                return entries
        entries = self._processor([image], **settings)
        self.cached.append((image, settings, entries))
        return entries


def _concatenate(entries: list[Any]) -> dict[str, Any] | None:
    """Several images one after the other, as their processor would return them; None if it does otherwise."""
    first = dict(entries[0])
    if set(first) not in _SEPARATE or not all(isinstance(value, torch.Tensor) for value in first.values()):
        return None
    crops = first["pixel_values"].shape[:1] == (1,) and first["pixel_values"].ndim == 4
    if "image_grid_thw" not in first and not (
        crops and all(each["pixel_values"].shape == first["pixel_values"].shape for each in entries)
    ):
        return None
    return {name: torch.cat([each[name] for each in entries]) for name in first}
