"""The layout of each family against its own processor and vision tower: the box of every token, and their order."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image

from carve_kernels import VisualLayout, layout_of
from carve_kernels.hf.families import Family, family_of
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.layouts.comparison import deviations
from carve_kernels.hf.layouts.coordinates import coordinates
from carve_kernels.hf.layouts.measured import measure
from carve_kernels.hf.layouts.token_boxes import boxes_of
from carve_kernels.types import Size
from tests.support.processors.kinds import pair, pairs, zoo_kind

# In cells.
TOLERANCE = 0.05
# (height, width): one pixel off multiples of 14 and 16, tiny, tall, wide, odd.
SHAPES = [(113, 225), (20, 31), (301, 75), (60, 333), (131, 97)]
# One for each kind of layout and its options; `make test` has three shapes of these, and one of the others.
DISTINCT = (
    *("qwen2_vl", "video_llama_3", "hunyuan_vl", "muse_glimmer", "llava", "paligemma", "gemma3", "gemma4", "kimi_k25"),
    *(
        "gemma4_unified",
        "mistral3",
        "lighton_ocr",
        "deepseek_vl",
        "got_ocr2",
        "fuyu",
        "internvl",
        "aya_vision",
        "ovis2",
    ),
    *("cohere2_vision", "llava_next", "idefics3", "smolvlm", "lfm2_vl", "llama4", "minicpmv4_6", "molmo2"),
)
# Their tokens are codes, which no gradient reaches; where the image is cut is measured, in which order they are is not.
CODES = ("chameleon", "emu3")
# The edge of their image is resized twice with what is around it, which cannot be measured: see `test_single_tokens`.
EDGES = ("deepseek_vl_hybrid",)
# Families that are not listed, so that their layout itself is measured.
UNLISTED = ("video_llava",)
# How many random sizes: in `make test`, and in all.
FEW, ALL = 4, 50
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "qwen2_vl": [{"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9}}],
    "internvl": [{"crop_to_patches": False}, {"max_patches": 2}],
    "idefics3": [{"do_image_splitting": False}],
    "gemma3": [
        {
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 32,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        }
    ],
}


def slow_unless(fast: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


@functools.cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(getattr(skimage.data, name)()) for name in ("chelsea", "astronaut", "coffee")]


def photograph(size: Size) -> Image.Image:
    """A real photograph of this size, cut out of a larger one and resized."""
    photo = photographs()[sum(size) % 3]
    scale = min(photo.height / size[0], photo.width / size[1])
    box = (0, 0, size[1] * scale, size[0] * scale)
    return photo.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def prepared(name: str, photo: Image.Image, settings: Mapping[str, Any]) -> Any:
    """What the processor makes of a photograph."""
    processor = pair(name)[1]
    prompt = build_prompt(processor, "x")
    if settings:
        return processor(images=[photo], text=[prompt], return_tensors="pt", **settings)
    return prepare(processor, [photo], prompt)


def layout(name: str, size: Size, settings: Mapping[str, Any]) -> VisualLayout:
    photo = photograph(size)
    return layout_of(*pair(name), prepared(name, photo, settings), [photo])


def family(name: str) -> Family:
    """The family of a processor's model; a processor without one is missing in `families.FAMILIES`."""
    if not zoo_kind(name).exists():
        pytest.skip(f"transformers has no {zoo_kind(name).class_name}")
    model, processor = pair(name)
    found = family_of(model.config.model_type, processor)
    assert found is not None or name in UNLISTED, f"{model.config.model_type} has no layout and no reason why"
    return Family(None) if found is None else found


@pytest.mark.parametrize(
    ("size", "name"),
    [
        pytest.param(
            size,
            name,
            id=f"{name}-{size[1]}x{size[0]}",
            marks=() if index == 0 or (index < 3 and name in DISTINCT) else pytest.mark.slow,
        )
        for index, size in enumerate(SHAPES)
        for name in pairs()
    ],
)
def test_every_token_lies_where_it_is_measured(name: str, size: Size) -> None:
    check(name, size, {})


@pytest.mark.parametrize(
    ("name", "settings"), [pytest.param(name, each, id=f"{name}-{each}") for name in OPTIONS for each in OPTIONS[name]]
)
def test_every_token_lies_where_it_is_measured_with_other_settings(name: str, settings: dict[str, Any]) -> None:
    for size in SHAPES[:2]:
        check(name, size, settings)


@pytest.mark.parametrize(
    ("name", "count"),
    [slow_unless(count == FEW and name in DISTINCT, name, count) for count in (FEW, ALL) for name in pairs()],
)
def test_the_tokens_of_any_size_fit(name: str, count: int) -> None:
    if family(name).reason is not None:
        return
    draw = random.Random(0)
    for _ in range(count):
        size = draw.randint(16, 400), draw.randint(16, 400)
        if max(size) < 20 * min(size):
            found = layout(name, size, {})
            assert found.views[0] and found.measured is (name in UNLISTED)


def check(name: str, size: Size, settings: dict[str, Any]) -> None:
    if family(name).reason is not None:
        with pytest.raises(ValueError, match="no place"):
            layout(name, size, settings)
        return
    found = layout(name, size, settings)
    if name in EDGES:
        return
    if name in CODES:
        check_outline(name, size, found)
        return
    off = deviations(found, measure(*pair(name), size, settings=settings))
    assert len(off) > 0
    worst = int(off.argmax())
    assert float(off[worst]) <= TOLERANCE, f"token {worst} of {len(off)} is {float(off[worst]):.3f} cells off"


def check_outline(name: str, size: Size, found: VisualLayout) -> None:
    """The views together cover what the processor keeps of the image."""
    (view,) = found.views[0]
    pixels, origin = coordinates(lambda images: without_text(prepared(name, images[0], {})), [size])
    box = boxes_of(torch.zeros(len(origin.image), dtype=torch.int64), origin, 1)[0][0]
    assert len(pixels.leaves) == 1
    for axis in (0, 1):
        cell = (view.box[axis + 2] - view.box[axis]) / view.grid[1 - axis]
        for edge in (axis, axis + 2):
            assert abs(view.box[edge] - float(box[edge])) <= TOLERANCE * cell
    with pytest.raises(ValueError, match="it embeds codes of the image"):
        measure(*pair(name), size)


def without_text(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
