"""Families of transformers that are not listed: their layouts are measured, and are what their processors say."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import transformers

from carve_kernels import CarveEngine, Preset, layout_of
from carve_kernels.hf.families import FAMILIES
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.model import attention_modules
from carve_kernels.types import Size
from tests.hf.layouts.test_measured import photograph
from tests.hf.layouts.test_zoo import skip_unavailable
from tests.support.processors.kinds import template, tokenizer
from tests.support.processors.single import SQUARE
from tests.support.zoo.kinds import build, kinds


def perception_lm() -> Any:
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    return transformers.PerceptionLMProcessor(
        transformers.PerceptionLMVideoProcessor(size=SQUARE),
        transformers.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=6),
        tokenizer(tuple(names.values()), names),
        patch_size=14,
        pooling_ratio=2,
        chat_template=template("<|image|>", "<|video|>"),
    )


def step3p7() -> Any:
    marks = ("<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
    images = transformers.Step3p7ImageProcessor(size={"height": 112, "width": 112}, patch_size=56, max_image_size=336)
    return transformers.Step3p7Processor(
        images, tokenizer(("<im_patch>", "<v>", *marks)), chat_template=template("<im_patch>")
    )


def nemotron_h_omni() -> Any:
    names = {"image_token": "<image>", "video_token": "<video>", "audio_token": "<so_embedding>"}
    names |= {"image_start_token": "<img>", "image_end_token": "</img>"}
    special = (
        "<image>",
        "<video>",
        "<img>",
        "</img>",
        *(f"<|unused{number}|>" for number in range(6)),
        "<so_embedding>",
    )
    return transformers.NemotronH_Omni_Reasoning_V3Processor(
        transformers.NemotronH_Omni_Reasoning_V3ImageProcessor(patch_size=14, min_num_patches=4, max_num_patches=256),
        transformers.NemotronH_Omni_Reasoning_V3VideoProcessor(patch_size=14),
        tokenizer(special, names),
        transformers.WhisperFeatureExtractor(feature_size=16),
        chat_template=template("<image>", "<video>"),
    )


# For each size the grid and the box of every view, in the order of the prompt.
BOXES: dict[str, dict[Size, list[tuple[Size, tuple[float, ...]]]]] = {
    "perception_lm": {
        (113, 225): [
            ((2, 2), (0, 0, 225, 113)),
            *[
                ((2, 2), (75 * column, 56.5 * row, 75 * (column + 1), 56.5 * (row + 1)))
                for row in (0, 1)
                for column in range(3)
            ],
        ],
        (301, 75): [((2, 2), (0, 0, 75, 301)), ((8, 2), (0, 0, 75, 301))],
    },
    "step3p7": {
        (113, 225): [((2, 4), (0, 0, 225, 113)), ((2, 2), (0, 0, 225, 113))],
        (112, 112): [((2, 2), (0, 0, 112, 112))],
    },
    "nemotron_h_omni": {(113, 225): [((5, 9), (0, 0, 225, 113))], (301, 75): [((11, 3), (0, 0, 75, 301))]},
}


@functools.cache
def measured(name: str) -> tuple[Any, Any]:
    skip_unavailable(kinds()[name])
    return build(name)[0], globals()[name]()


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in BOXES for size in BOXES[name]], ids=str)
def test_the_views_are_those_of_the_processor(name: str, size: Size) -> None:
    model, processor = measured(name)
    image = photograph(size)
    layout = layout_of(model, processor, prepare(processor, [image], build_prompt(processor, "x")), [image])
    assert layout.measured and name not in FAMILIES
    views, expected = layout.views[0], BOXES[name][size]
    assert [view.grid for view in views] == [grid for grid, _ in expected]
    for view, (_, box) in zip(views, expected, strict=True):
        assert view.box == pytest.approx(box, abs=0.5)


def test_a_thin_image_that_is_padded_to_a_square_is_refused() -> None:
    model, processor = measured("step3p7")
    image = photograph((20, 200))
    with pytest.raises(ValueError, match=r"^model: the image tokens have no place .* it sees padding"):
        layout_of(model, processor, prepare(processor, [image], build_prompt(processor, "x")), [image])


@pytest.mark.parametrize("name", BOXES)
def test_the_engine_asks_them(name: str) -> None:
    model, processor = measured(name)
    preset = Preset.release(layers=sorted(attention_modules(model))[-2:], max_new_tokens=1, images="refined")
    result = CarveEngine(model, processor, preset=preset).ask(photograph((113, 225)), "what digit is red")
    assert result.layout.measured and result.reason is None and result.unseen == 0
