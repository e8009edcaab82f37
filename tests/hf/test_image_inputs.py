"""Images go through the processor once, and the inputs equal those of the processor itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset
from carve_kernels.hf.image_inputs import ImageInputs
from carve_kernels.hf.inputs import build_prompt, prepare
from tests.support.families import FAMILIES, family
from tests.support.processors.kinds import pair
from tests.support.tiny_models import make_image

PHOTO, OTHER = make_image(240, 160, 1), make_image(100, 180, 2)


def counted(monkeypatch: pytest.MonkeyPatch, processor: Any) -> list[int]:
    """The number of images in each call of an image processor."""
    calls: list[int] = []
    kind = type(processor.image_processor)
    call = kind.__call__

    def counting(self: Any, images: Any, *args: Any, **settings: Any) -> Any:
        calls.append(len(images) if isinstance(images, list) else 1)
        return call(self, images, *args, **settings)

    monkeypatch.setattr(kind, "__call__", counting)
    return calls


@pytest.mark.parametrize("max_pixels", [None, 112 * 112])
@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_are_the_processors_own(name: str, max_pixels: int | None) -> None:
    processor = family(name)[1]
    image_inputs = ImageInputs(processor, torch.device("cpu"), max_pixels)
    before = dict(processor.__dict__)
    for images, text in (([PHOTO], "what"), ([PHOTO, OTHER], "which"), ([OTHER], "who"), ([PHOTO, PHOTO], "same")):
        prompt = build_prompt(processor, text, len(images))
        expected = prepare(processor, images, prompt, None, max_pixels)
        text_inputs, features = image_inputs.inputs(images, prompt)
        found = {**text_inputs, **features.entries}
        assert set(found) == set(expected) and not any(key.startswith("pixel") for key in text_inputs)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        expected = prepare(processor, images[-1:], build_prompt(processor, text), None, max_pixels)
        last = image_inputs.subset(images[-1:])
        assert last is not None and all(torch.equal(value, expected[key]) for key, value in last.entries.items())
    assert processor.__dict__ == before


def test_a_processor_with_other_entries_gets_all_images_at_once() -> None:
    processor = family("llava")[1]
    image_inputs = ImageInputs(processor, torch.device("cpu"), None)
    caching = image_inputs._image_processor
    plain = caching._processor

    class Sized:
        """Returns the size of each image as well, as LLaVA-NeXT's does."""

        def __getattr__(self, name: str) -> Any:
            return getattr(plain, name)

        def __call__(self, images: Any, **settings: Any) -> Any:
            entries = plain(images, **settings)
            entries["image_sizes"] = torch.tensor([[image.height, image.width] for image in images])
            return entries

    caching._processor = Sized()
    _, features = image_inputs.inputs([PHOTO, OTHER], build_prompt(processor, "which", 2))
    assert features.entries["image_sizes"].tolist() == [[160, 240], [180, 100]]
    assert image_inputs.subset([OTHER]) is None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_a_question_processes_each_image_once(name: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = family(name)
    settings = Preset.of({"preset": preset, "layers": [1], "max_new_tokens": 2})
    calls = counted(monkeypatch, processor)
    result = CarveEngine(model, processor, preset=settings)(PHOTO, "what digit is red")
    assert result.reason is None and calls == [1, 1]


@pytest.mark.parametrize("name", ["qwen2_vl", "glm4v", "glm46v", "cosmos3_edge", "paddleocr_vl"])
def test_a_bound_of_pixels_is_that_of_the_resized_image(name: str) -> None:
    """GLM and Cosmos 3 count each pixel once for each of the two frames that an image is repeated to."""
    _, processor = pair(name)
    image, bound = make_image(420, 280, 4), 200 * 200
    processor = copy.copy(processor)
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 10**7}
    for inputs in (
        prepare(processor, [image], build_prompt(processor, "what"), None, bound),
        ImageInputs(processor, torch.device("cpu"), bound).inputs([image], build_prompt(processor, "what"))[0],
    ):
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        pixels = rows * columns * processor.image_processor.patch_size**2
        assert 0.7 * bound < pixels <= bound
