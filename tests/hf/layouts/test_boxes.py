"""The box of a centre crop: a square in the image is position at its position in the pixels of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from carve_kernels import layout_of
from carve_kernels.types import View
from tests.support import tiny_models

CROP_84 = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    return tiny_models.tiny_llava()


def torchvision_clip(**settings: Any) -> Any:
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(**settings)


GEOMETRIES = {
    "clip": (CLIPImageProcessorPil, CROP_84),
    "clip on torchvision": (torchvision_clip, CROP_84),
    "smaller crop, rest of a patch": (
        CLIPImageProcessorPil,
        {"size": {"shortest_edge": 112}, "crop_size": {"height": 73, "width": 90}},
    ),
    "odd crop on torchvision": (
        torchvision_clip,
        {"size": {"shortest_edge": 112}, "crop_size": {"height": 73, "width": 90}},
    ),
    "stretched": (
        CLIPImageProcessorPil,
        {"size": {"height": 84, "width": 84}, "do_center_crop": False},
    ),
    "crop larger than the image": (
        CLIPImageProcessorPil,
        {"size": {"shortest_edge": 61}, "crop_size": {"height": 84, "width": 210}},
    ),
    "crop larger, on torchvision": (
        torchvision_clip,
        {"size": {"shortest_edge": 61}, "crop_size": {"height": 84, "width": 210}},
    ),
    "not resized": (CLIPImageProcessorPil, {"do_resize": False, "crop_size": {"height": 154, "width": 84}}),
    "padded to a square": (LlavaImageProcessorPil, {**CROP_84, "do_pad": True}),
    "llava, not padded": (LlavaImageProcessorPil, CROP_84),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize(("width", "height"), [(336, 168), (167, 301)])
def test_the_box_maps_a_square_to_its_position(llava: tuple[Any, Any], name: str, width: int, height: int) -> None:
    model, processor = llava
    make, settings = GEOMETRIES[name]
    image_processor = make(**settings)
    centre = (width // 2 + 23, height // 2 - 17)
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle([centre[0] - 10, centre[1] - 10, centre[0] + 9, centre[1] + 9], fill="white")
    pixels = image_processor(image, return_tensors="pt")["pixel_values"]
    view = _view_of(model, processor, image_processor, pixels, image)

    rows, columns = view.grid
    bright = _bright_centre(pixels[0, 0, : rows * 14, : columns * 14])
    left, top, right, bottom = view.box
    position = left + bright[0] / (columns * 14) * (right - left), top + bright[1] / (rows * 14) * (bottom - top)
    # In pixels of the resized image, or of the original if those are larger.
    tolerance = 0.25 * max((right - left) / (columns * 14), (bottom - top) / (rows * 14), 1)
    assert abs(position[0] - centre[0]) < tolerance
    assert abs(position[1] - centre[1]) < tolerance


def test_llava_crops_the_centre_of_a_wide_image(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    image = Image.new("RGB", (336, 168))
    ImageDraw.Draw(image).rectangle([230, 20, 249, 39], fill="white")
    inputs = tiny_models.inputs_for(processor, [image], ["x"])
    view = layout_of(model, processor, inputs, [image]).views[0][0]
    assert (view.grid, view.box) == ((6, 6), (84, 0, 252, 168))
    bright = _bright_centre(inputs["pixel_values"][0, 0])
    assert 230 <= 84 + bright[0] / 84 * 168 <= 250
    stretched = bright[0] / 84 * 336
    assert not 230 <= stretched <= 250


def _view_of(model: Any, processor: Any, image_processor: Any, pixels: torch.Tensor, image: Image.Image) -> View:
    """The view under the given image processor."""
    count = (pixels.shape[-2] // 14) * (pixels.shape[-1] // 14)
    inputs = {"input_ids": torch.full((1, count), model.config.image_token_id), "pixel_values": pixels}
    whole = type(processor)(
        image_processor,
        processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return layout_of(model, whole, inputs, [image]).views[0][0]


def _bright_centre(channel: torch.Tensor) -> tuple[float, float]:
    """Centre of mass (x, y) of the bright pixels."""
    weight = (channel - (channel.amax() + channel.amin()) / 2).clamp_min(0)
    rows, columns = (torch.arange(length) + 0.5 for length in channel.shape)
    return float((weight.sum(0) * columns).sum() / weight.sum()), float((weight.sum(1) * rows).sum() / weight.sum())
