"""Images that are given in another order than in the prompts are refused, also where their tokens are equally many."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from PIL import Image

from carve_kernels import VisualLayout, layout_of
from carve_kernels.hf.families import family_of
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.types import Size
from tests.hf.layouts.test_measured import photograph
from tests.support.processors.kinds import pair, pairs, zoo_kind

NAMES = list(pairs())
# (height, width): two by three tiles, three by two, and as many tokens.
SIZES: tuple[Size, Size] = ((120, 180), (180, 120))
# Their processors take the images of each prompt as a list.
LISTS = (
    *("gemma3", "gemma4", "gemma4_e", "gemma4_unified", "granite_docling", "idefics3", "smolvlm", "lfm2_vl"),
    *("llava_onevision", "gemma3n"),
)


@functools.cache
def image_of(size: Size, flipped: bool = False) -> Image.Image:
    photo = photograph(size)
    return photo.transpose(Image.Transpose.ROTATE_180) if flipped else photo


def inputs_of(name: str, rows: list[list[Image.Image]], **settings: Any) -> Any:
    _, processor = pair(name)
    images: list[Any] = rows if name in LISTS else [image for row in rows for image in row]
    prompts = [build_prompt(processor, "x", len(row)) for row in rows]
    padding = {"padding": True, "padding_side": "left"} if len(rows) > 1 else {}
    return processor(images=images, text=prompts, return_tensors="pt", **padding, **settings)


def layout_for(name: str, inputs: Any, rows: list[list[Image.Image]]) -> VisualLayout:
    return layout_of(*pair(name), inputs, rows)


def skip_without_layout(name: str) -> None:
    if not zoo_kind(name).exists():
        pytest.skip(f"transformers has no {zoo_kind(name).class_name}")
    model, processor = pair(name)
    found = family_of(model.config.model_type, processor)
    if found is None or found.kind is None:
        pytest.skip("not listed with a layout")


@pytest.mark.parametrize("name", NAMES)
def test_another_order_of_a_row_is_refused(name: str) -> None:
    skip_without_layout(name)
    if name == "fuyu":
        pytest.skip("a prompt has one image")
    row = [image_of(SIZES[0]), image_of(SIZES[0], flipped=True)]
    inputs = inputs_of(name, [row])
    assert layout_for(name, inputs, [row]).views[0]
    with pytest.raises(ValueError, match=r"^(images|inputs): "):
        layout_for(name, inputs, [row[::-1]])


@pytest.mark.parametrize("name", NAMES)
def test_another_order_of_rows_is_refused(name: str) -> None:
    skip_without_layout(name)
    rows = [[image_of(size)] for size in SIZES]
    inputs = inputs_of(name, rows)
    assert len(layout_for(name, inputs, rows).views) == 2
    with pytest.raises(ValueError, match=r"^(images|inputs): "):
        layout_for(name, inputs, rows[::-1])
