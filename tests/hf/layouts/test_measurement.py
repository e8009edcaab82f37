"""Measuring itself: planted coordinates, wrong layouts, what is left of it in the model, and families not listed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, View, VisualLayout, layout_of
from carve_kernels.hf import families
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.layouts import measured
from carve_kernels.hf.layouts.comparison import deviations
from carve_kernels.hf.layouts.coordinates import coordinates
from carve_kernels.hf.layouts.measured import Measured, measure, views_of
from carve_kernels.types import Size
from tests.hf.layouts.test_measured import photograph
from tests.support.processors.kinds import pair
from tests.support.zoo.kinds import build

SIZE = (113, 225)


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    yield
    measured._KNOWN.clear()


def cropped(images: list[Image.Image]) -> dict[str, Any]:
    """Columns 30 to 70 and rows 5 to 45 at twice their size, normalised, in 4 x 4 patches, beside padding."""
    image = images[0].crop((30, 5, 70, 45)).resize((80, 80), Image.Resampling.BILINEAR)
    values = torch.from_numpy(numpy.asarray(image).copy()).float().permute(2, 0, 1) / 127 - 3
    patches = values.reshape(3, 4, 20, 4, 20).permute(1, 3, 0, 2, 4).reshape(16, -1)
    return {"pixels": torch.cat([patches, torch.full((2, 1200), 0.5)]), "grid": torch.tensor([4, 4])}


def test_coordinates_are_those_of_a_known_crop() -> None:
    pixels, origin = coordinates(cropped, [(60, 100)])
    assert pixels.leaves == (("pixels",),)
    x, y = (place.view(18, 3, 20, 20) for place in origin.place)
    assert x[16:].isnan().all() and (origin.image.view(18, -1)[16:] == -1).all()
    # Twice the size: steps of half a pixel, and not clamped where the crop is within the image.
    for patch in range(16):
        left, top = 30 + patch % 4 * 10, 5 + patch // 4 * 10
        expected = torch.arange(20) / 2 + 0.25
        inner = slice(2, -2)
        assert (x[patch, :, :, inner] - left - expected[inner]).abs().max() < 0.1
        assert (y[patch, :, inner] - top - expected[inner, None]).abs().max() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value**2, "weighted means"),
        (lambda value: value * 0, "expected tensors that depend on the image's pixels, got none"),
        (lambda value: value.round().long(), "expected pixels to be the same for all images of a size"),
    ],
)
def test_other_pixel_values_are_refused(change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    def process(images: list[Image.Image]) -> dict[str, Any]:
        return {"pixels": change(torch.from_numpy(numpy.asarray(images[0]).copy()).float() / 25)}

    with pytest.raises(ValueError, match=message):
        coordinates(process, [(20, 30)])


def test_the_images_of_values_are_known() -> None:
    def process(images: list[Image.Image]) -> dict[str, Any]:
        return {"pixels": [torch.from_numpy(numpy.asarray(image).copy()).float() for image in reversed(images)]}

    sizes = [(40, 60), (30, 20), (50, 50)]
    pixels, origin = coordinates(process, sizes)
    first = 0
    for leaf, number in zip(pixels.tensors(), (2, 1, 0), strict=True):
        here = slice(first, first + leaf.numel())
        assert (origin.image[here] == number).all()
        expected = torch.arange(sizes[number][1]) + 0.5
        assert (origin.place[0][here].view(leaf.shape) - expected[None, :, None]).abs().max() < 0.2
        first += leaf.numel()


def listed(name: str, size: Size = SIZE) -> VisualLayout:
    model, processor = pair(name)
    photo = photograph(size)
    return layout_of(model, processor, prepare(processor, [photo], build_prompt(processor, "x")), [photo])


WRONG: dict[str, Callable[[View], View]] = {
    "a tenth of a cell to the right": lambda view: replace(view, box=moved(view.box, 2.5)),
    "transposed": lambda view: replace(view, grid=view.grid[::-1]),
    "column by column": lambda view: replace(view, tokens=view.tokens.view(view.grid).T.flatten()),
    "two tokens exchanged": lambda view: replace(view, tokens=view.tokens[[1, 0, *range(2, len(view.tokens))]]),
    "one row too few": lambda view: replace(
        view, grid=(view.grid[0] - 1, view.grid[1]), tokens=view.tokens[: -view.grid[1]]
    ),
    "another image": lambda view: replace(view, image=1),
}


def moved(box: tuple[float, float, float, float], right: float) -> tuple[float, float, float, float]:
    return box[0] + right, box[1], box[2] + right, box[3]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_layout_is_far_from_the_measurement(wrong: str) -> None:
    right = listed("qwen2_vl")
    found = measure(*pair("qwen2_vl"), SIZE)
    assert float(deviations(right, found).max()) < 0.02
    views = tuple(WRONG[wrong](view) for view in right.views[0])
    sizes = (*right.sizes[0], right.sizes[0][0]) if wrong == "another image" else right.sizes[0]
    off = deviations(VisualLayout((views,), (sizes,)), replace(found, sizes=(sizes,)))
    assert float(off.max()) > 0.08
    if wrong == "one row too few":
        assert int(off.isinf().sum()) == right.views[0][0].grid[1]


def state(model: Any) -> Any:
    return (
        {name: (len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in model.named_modules()},
        {name: each.training for name, each in model.named_modules()},
        {
            name: (each.requires_grad, each.dtype, each.grad is None, each._version)
            for name, each in model.named_parameters()
        },
        {name: each._version for name, each in model.named_buffers()},
        [each.rope_deltas for each in model.modules() if hasattr(each, "rope_deltas")],
    )


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = build("qwen2_vl")
    processor = pair("qwen2_vl")[1]
    with torch.no_grad():
        # transformers adds hooks of its own at the first forward.
        model(**inputs)
    model.train()
    model.model.visual.eval()
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    if error is None:
        measure(model, processor, SIZE)
    else:

        def fails(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(measured, "boxes_of", fails)
        with pytest.raises(error):
            measure(model, processor, SIZE)
    assert state(model) == before


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_in_half_precision_and_without_gradients_the_boxes_are_the_same(name: str) -> None:
    model, processor = build(name)[0], pair(name)[1]
    expected = measure(model, processor, (60, 90))
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        with torch.inference_mode():
            found = measure(model, processor, (60, 90))
        assert torch.equal(found.boxes, expected.boxes)


@pytest.mark.parametrize("name", ["idefics2", "deepseek_ocr2"])
def test_tokens_without_a_place_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^model: .*(have no place in the image|cannot be measured)"):
        measure(*pair(name), SIZE)


def test_views_of_tiles_a_newline_and_a_token_of_its_own() -> None:
    """Two tiles of 2 x 2, a newline, the whole image in 1 x 2, and a token that shows the middle."""
    tiles = [(x + dx, y, x + dx + 10, y + 10) for x in (0, 20) for y in (0, 10) for dx in (0, 10)]
    boxes = [*tiles, (torch.nan,) * 4, (0, 0, 20, 20), (20, 0, 40, 20), (5, 5, 9, 9)]
    images = torch.tensor([0] * 8 + [-1] + [0] * 3)
    tokens = torch.stack([torch.zeros(12, dtype=torch.int64), torch.arange(12) + 7], 1)
    found = Measured(torch.tensor(boxes, dtype=torch.float64), images, tokens, (((20, 40),),))
    (views,) = views_of(found)
    assert [(view.grid, view.box, view.kind, view.tokens.tolist()) for view in views] == [
        ((2, 2), (0, 0, 20, 20), "tile", [7, 8, 9, 10]),
        ((2, 2), (20, 0, 40, 20), "tile", [11, 12, 13, 14]),
        ((1, 2), (0, 0, 40, 20), "base", [16, 17]),
        ((1, 1), (5, 5, 9, 9), "tile", [18]),
    ]
    assert float(deviations(VisualLayout((views,), found.sizes), found).max()) == 0


def unlist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.FAMILIES, name)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "internvl", "llava_next"])
def test_a_family_that_is_not_listed_has_the_same_views(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = listed(name)
    assert not right.measured
    unlist(name, monkeypatch)
    with caplog.at_level(logging.INFO, logger="carve_kernels"):
        found = listed(name)
        calls = count_calls(pair(name)[1], monkeypatch)
        again = listed(name)
    assert found.measured and len(calls) <= 1
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        f"no layout is known for model_type {name!r}: where its image tokens lie is measured"
    ]
    for layout in (found, again):
        for view, expected in zip(layout.views[0], right.views[0], strict=True):
            assert view.grid == expected.grid and torch.equal(view.tokens, expected.tokens)
            assert max(abs(one - other) for one, other in zip(view.box, expected.box, strict=True)) < 0.3


def count_calls(processor: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of an image processor, counted by way of its class."""
    calls: list[int] = []
    kind = type(processor.image_processor)
    call = kind.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counted)
    return calls


def test_the_settings_of_a_processor_that_cannot_be_written_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ernie's video processor cannot without the file of its font; measured again are other settings."""
    right = listed("ernie4_5_vl_moe")
    processor = pair("ernie4_5_vl_moe")[1]
    with pytest.raises(ValueError, match="font"):
        processor.to_json_string()
    unlist("ernie4_5_vl_moe", monkeypatch)
    found = listed("ernie4_5_vl_moe")
    assert found.measured and torch.equal(found.tokens(), right.tokens())
    before = measured._settings_of(processor)
    monkeypatch.setattr(processor.image_processor, "size", {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9})
    assert measured._settings_of(processor) != before
    monkeypatch.undo()
    monkeypatch.setattr(processor, "image_token", "<|other|>")
    assert measured._settings_of(processor) != before


def test_a_batch_of_a_family_that_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair("qwen2_vl")
    photos = [[photograph((131, 97)), photograph((60, 90))], [photograph((80, 80))]]
    texts = [build_prompt(processor, "x", 2), build_prompt(processor, "a longer question about it", 1)]
    inputs = processor(images=photos, text=texts, return_tensors="pt", padding=True)
    right = layout_of(model, processor, inputs, photos)
    unlist("qwen2_vl", monkeypatch)
    found = layout_of(model, processor, inputs, photos)
    assert found.sizes == right.sizes and torch.equal(found.tokens(), right.tokens())
    for row, expected in zip(found.views, right.views, strict=True):
        assert [(view.grid, view.image, view.box) for view in row] == [
            (view.grid, view.image, view.box) for view in expected
        ]


def test_inputs_of_other_images_settings_and_lengths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair("internvl")
    unlist("internvl", monkeypatch)
    photo = photograph(SIZE)
    prompt = build_prompt(processor, "x")
    inputs = prepare(processor, [photo], prompt)
    with pytest.raises(ValueError, match=r"^inputs: pixel_values of shape .* is not what the processor makes of"):
        layout_of(model, processor, inputs, [(225, 60)])
    other = processor(images=[photo], text=[prompt], return_tensors="pt", crop_to_patches=False)
    with pytest.raises(ValueError, match="set them on the processor instead of passing them to a call"):
        layout_of(model, processor, other, [photo])
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    short = {**inputs, "input_ids": inputs["input_ids"][:, :-20]}
    left = int((short["input_ids"] == model.config.image_token_id).sum())
    with pytest.raises(ValueError, match=f"^inputs: row 0 has {left} image tokens, .* need {count}; "):
        layout_of(model, processor, short, [photo])


@pytest.mark.parametrize("max_pixels", [None, 28 * 28 * 6])
def test_the_engine_answers_for_a_family_that_is_not_listed(
    max_pixels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bound of pixels, too, which it passes to each call of the processor."""
    model, processor = pair("qwen2_vl")
    preset = Preset.paper(layers=(1,), max_new_tokens=2, max_pixels=max_pixels)
    right = CarveEngine(model, processor, preset=preset, memory=False)(photograph(SIZE), "what is it")
    unlist("qwen2_vl", monkeypatch)
    found = CarveEngine(model, processor, preset=preset, memory=False)(photograph(SIZE), "what is it")
    assert found.answer == right.answer and torch.equal(found.saliency, right.saliency)
    with pytest.raises(ValueError, match="fit: expected None, got 'pad': what a processor of 'qwen2_vl' crops is"):
        CarveEngine(model, processor, preset=preset, fit="pad")(photograph(SIZE), "what is it")
