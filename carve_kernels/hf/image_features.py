"""Pictures on their way into the model: each goes through the processor once and through the vision tower once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from carve_kernels.hf import names
from carve_kernels.hf.inputs import prepare
from carve_kernels.hf.layouts.letterbox import Letterbox

# What the entries are called that only the vision tower reads.
_PIXELS = "pixel"
# What the image processors return that treat each picture by itself and lay the results one behind the other.
_ONE_BY_ONE = ({"pixel_values"}, {"pixel_values", "image_grid_thw"})


class Shown:
    """What a processor made of a picture (or of several), and, once a prompt needed it, what the vision tower did."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.entries = entries
        self._taken: dict[str, Any] | None = None

    def taken(self, model: Any) -> dict[str, Any]:
        """What the model's forward takes for it; the vision tower has run."""
        if self._taken is None:
            results = names.tower_results(model, self.entries)
            if results is None:
                return dict(self.entries)
            self._taken = results
        return self._taken

    def forget(self) -> None:
        """Let go of what the processor made, where the vision tower's work is at hand."""
        if self._taken is not None:
            self.entries = {}


class Pictures:
    """Model inputs of prompts that show the same pictures, from a processor that is not changed."""

    def __init__(
        self, processor: Any, device: torch.device, max_pixels: int | None, letterbox: Letterbox | None = None
    ) -> None:
        self._once = _Once(processor.image_processor)
        self._processor = copy.copy(processor)
        self._processor.image_processor = self._once
        self._device, self._max_pixels = device, max_pixels
        self._letterbox = letterbox
        self._canvases: list[tuple[Image.Image, Image.Image]] = []

    def inputs(self, images: list[Image.Image], prompt: str) -> tuple[dict[str, Any], Shown]:
        """What the processor made of a prompt but its pixels (grids place tokens, too), and all of its pictures."""
        laid = [self._laid(image) for image in images]
        inputs = prepare(self._processor, laid, prompt, self._device, self._max_pixels)
        placed = {name: value for name, value in inputs.items() if not name.startswith(_PIXELS)}
        return placed, Shown({name: value for name, value in inputs.items() if not names.is_text(name)})

    def alone(self, image: Image.Image) -> Shown | None:
        """One of the pictures; None where the processor made something of all of them together."""
        entries = self._once.of(self._laid(image))
        if entries is None:
            return None
        return Shown({name: value.to(self._device) for name, value in entries.items()})

    def forget(self) -> None:
        """Let go of what the processor made of the pictures."""
        self._once.kept.clear()
        self._canvases.clear()

    def _laid(self, image: Image.Image) -> Image.Image:
        """The picture on its canvas, the same object each time, as what the processor made of it is known by it."""
        if self._letterbox is None:
            return image
        for original, laid in self._canvases:
            if original is image:
                return laid
        self._canvases.append((image, self._letterbox.laid(image)))
        return self._canvases[-1][1]


class _Once:
    """An image processor that is asked once for each picture."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.kept: list[tuple[Image.Image, dict[str, Any], Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, *args: Any, **settings: Any) -> Any:
        flat = images if isinstance(images, list) else [images]
        if args or not all(isinstance(image, Image.Image) for image in flat):
            return self._processor(images, *args, **settings)
        single = [self._single(image, settings) for image in flat]
        if len(single) == 1:
            return type(single[0])(dict(single[0]))
        joined = _joined(single)
        return self._processor(images, **settings) if joined is None else type(single[0])(joined)

    def of(self, image: Image.Image) -> dict[str, Any] | None:
        """What came of one picture, if pictures are treated one by one."""
        found = [features for kept, _, features in self.kept if kept is image]
        return dict(found[-1]) if found and _joined(found[-1:]) is not None else None

    def _single(self, image: Image.Image, settings: dict[str, Any]) -> Any:
        for kept, under, features in self.kept:
            if kept is image and under == settings:
                return features
        features = self._processor([image], **settings)
        self.kept.append((image, settings, features))
        return features


def _joined(features: list[Any]) -> dict[str, Any] | None:
    """Several pictures one behind the other, as their processor would lay them; None where it does otherwise."""
    first = dict(features[0])
    if set(first) not in _ONE_BY_ONE or not all(isinstance(value, torch.Tensor) for value in first.values()):
        return None
    crops = first["pixel_values"].shape[:1] == (1,) and first["pixel_values"].ndim == 4
    if "image_grid_thw" not in first and not (
        crops and all(each["pixel_values"].shape == first["pixel_values"].shape for each in features)
    ):
        return None
    return {name: torch.cat([each[name] for each in features]) for name in first}
