"""The layout of each family against its own processor and vision tower: the box of every token, and their order."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image

from carve_kernels import View, VisualLayout, layout_of
from carve_kernels.hf.families import Family, family_of
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.layouts import influence
from carve_kernels.hf.layouts.comparison import deviations
from carve_kernels.hf.layouts.measured import Measured, measure, measured_layout, views_of
from carve_kernels.types import Size
from tests.hf.layouts.test_zoo import skip_unavailable
from tests.support.processors.kinds import pair, pairs, zoo_kind
from tests.support.zoo.kinds import build

# In cells.
TOLERANCE = 0.05
# (height, width): odd, one pixel off multiples of 14 and 16, tiny, wide, tall.
SHAPES = [(131, 97), (113, 225), (20, 31), (60, 333), (301, 75)]
# Of 50 sizes, these many in `make test`.
FEW = 6
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "qwen2_vl": [{"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9}}],
    "internvl": [{"crop_to_patches": False}, {"max_patches": 2}],
}


@functools.cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(getattr(skimage.data, name)()) for name in ("chelsea", "astronaut", "coffee")]


def photograph(size: Size) -> Image.Image:
    """A real photograph of this size, cut out of a larger one and resized."""
    photo = photographs()[sum(size) % 3]
    scale = min(photo.height / size[0], photo.width / size[1])
    box = (0, 0, size[1] * scale, size[0] * scale)
    return photo.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def layout(name: str, size: Size, settings: Mapping[str, Any]) -> VisualLayout:
    model, processor = pair(name)
    photo = photograph(size)
    inputs = processor(images=[photo], text=[build_prompt(processor, "x")], return_tensors="pt", **settings)
    return layout_of(model, processor, inputs, [photo])


def family(name: str) -> Family:
    """The family of a processor's model; a processor without one is missing in `families.FAMILIES`."""
    skip_unavailable(zoo_kind(name))
    model, processor = pair(name)
    found = family_of(model.config.model_type, processor)
    assert found is not None, f"{model.config.model_type} has no layout and no reason why"
    return found


@pytest.mark.parametrize("name", pairs())
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_every_token_lies_where_it_is_measured(name: str, size: Size) -> None:
    check(name, size, {})


@pytest.mark.parametrize(
    ("name", "settings"), [pytest.param(name, each, id=f"{name}-{each}") for name in OPTIONS for each in OPTIONS[name]]
)
def test_every_token_lies_where_it_is_measured_with_other_settings(name: str, settings: dict[str, Any]) -> None:
    for size in SHAPES[:2]:
        check(name, size, settings)


def check(name: str, size: Size, settings: dict[str, Any]) -> None:
    if family(name).reason is not None:
        with pytest.raises(ValueError, match="no place"):
            layout(name, size, settings)
        return
    model, processor = pair(name)
    off = deviations(layout(name, size, settings), measure(model, processor, size, settings=settings))
    assert len(off) > 0
    worst = int(off.argmax())
    assert float(off[worst]) <= TOLERANCE, f"token {worst} of {len(off)} is {float(off[worst]):.3f} cells off"
