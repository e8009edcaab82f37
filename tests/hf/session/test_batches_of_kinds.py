"""Batches of every kind of processor, padded on both sides: the layout and the maps of each prompt alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from carve_kernels import capture_attention, layout_of
from carve_kernels.hf.inputs import build_prompt
from tests.support.processors.kinds import pair, pairs, zoo_kind
from tests.support.tiny_models import make_image

IMAGES = [[make_image(140, 90, 1), make_image(57, 150, 2)], [make_image(200, 64, 3)]]
TEXTS = ["what digit is red", "where is the small square at the left of it"]
# One of each way of laying out images; `make slow` takes the others.
SOON = ("gemma3", "idefics3", "internvl", "llava_next", "pixtral", "qwen3_vl")
# Without a place in the image, with one text only, or the tower changes with the size of the batch's largest image.
OTHERS = ("aria", "deepseek_ocr2", "idefics2", "fuyu", "emu3", "llama4", "cosmos3_edge")
NAMES = [
    pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in sorted(pairs()) if name not in OTHERS
]


def inputs_of(name: str, rows: slice, **padding: Any) -> Any:
    processor = pair(name)[1]
    images, texts = IMAGES[rows], TEXTS[rows]
    prompts = [build_prompt(processor, text, len(row)) for text, row in zip(texts, images, strict=True)]
    try:
        return processor(images=images, text=prompts, return_tensors="pt", **padding)
    except (TypeError, ValueError):
        # Some take the images of all prompts in one list.
        flat = [image for row in images for image in row]
        return processor(images=flat, text=prompts, return_tensors="pt", **padding)


def captured(name: str, rows: slice, **padding: Any) -> Any:
    model, processor = pair(name)
    inputs = inputs_of(name, rows, **padding)
    layout = layout_of(model, processor, inputs, IMAGES[rows])
    with capture_attention(model, layers="all", tokens=layout) as session, torch.no_grad():
        model(**inputs)
    return inputs, session.maps


@functools.cache
def alone(name: str, row: int) -> Any:
    return captured(name, slice(row, row + 1))[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_each_prompt_is_as_alone(name: str, side: str) -> None:
    if not zoo_kind(name).exists():
        pytest.skip("this transformers has no such class")
    inputs, maps = captured(name, slice(0, 2), padding=True, padding_side=side)
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 2
    for row, first in enumerate(inputs["attention_mask"].argmax(1).tolist()):
        single = alone(name, row)
        views, expected = maps.layout.views[row], single.layout.views[0]
        assert len(views) == len(expected) >= len(IMAGES[row])
        for index, (found, wanted) in enumerate(zip(views, expected, strict=True)):
            assert (found.grid, found.image, found.kind) == (wanted.grid, wanted.image, wanted.kind)
            # Measured boxes differ in their last digits.
            torch.testing.assert_close(found.box, wanted.box, rtol=1e-3, atol=1e-2)
            assert torch.equal(found.tokens, wanted.tokens + first)
            scale = float(single.values.max())
            assert float((maps.view(row, index) - single.view(0, index)).abs().max()) <= 2e-4 * scale
        assert not maps.values[row, ..., single.values.shape[-1] :].any()


def test_hunyuan_differs_in_a_batch_by_the_positions_that_the_model_makes() -> None:
    """It numbers the images of all rows together; under the positions of each row alone the maps are those alone."""
    if not zoo_kind("hunyuan_vl").exists():
        pytest.skip("this transformers has no such class")
    model, processor = pair("hunyuan_vl")
    inputs = inputs_of("hunyuan_vl", slice(0, 2), padding=True, padding_side="left")
    rows = [inputs_of("hunyuan_vl", slice(row, row + 1)) for row in (0, 1)]
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    together, *single = (model.model.get_rope_index(*(each[name] for name in names))[0] for each in (inputs, *rows))
    length = single[1].shape[-1]
    assert not torch.equal(together[:, 1, -length:], single[1][:, 0])
    together[:, 1, -length:] = single[1][:, 0]
    layout = layout_of(model, processor, inputs, IMAGES)
    with capture_attention(model, layers="all", tokens=layout) as session, torch.no_grad():
        model(**inputs, position_ids=together)
    expected = alone("hunyuan_vl", 1).values[0]
    found = session.maps.values[1, ..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
