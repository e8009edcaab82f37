"""Families with several views of an image: several images, batches, and prompts that do not fit their images."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from carve_kernels import View, VisualLayout, layout_of
from carve_kernels.hf import names
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.types import Size
from tests.hf.layouts.test_tiles_settings import SETTINGS, available
from tests.support.processors.kinds import pair

FAMILIES = tuple(SETTINGS)
# (height, width): tiny, wide, tall, nearly square.
SIZES: tuple[Size, ...] = ((20, 31), (60, 233), (201, 75), (131, 97))
# Prompts of several images have one view of each.
ONE_VIEW = ("llava_onevision",)


@functools.cache
def image_of(size: Size) -> Image.Image:
    return Image.effect_noise((size[1], size[0]), 90).convert("RGB")


def inputs_of(name: str, rows: Sequence[Sequence[Size]], **settings: Any) -> Any:
    """The processor's output for a batch; its rows are padded on the left."""
    _, processor = available(name)
    prompts = [build_prompt(processor, "x" * (number + 1), len(row)) for number, row in enumerate(rows)]
    images = [[image_of(size) for size in row] for row in rows]
    if name not in ("granite_docling", "idefics3", "smolvlm", "lfm2_vl", "llava_onevision"):
        images = [image for row in images for image in row]  # type: ignore[misc]
    padding = {"padding": True, "padding_side": "left"} if len(rows) > 1 else {}
    return processor(images=images, text=prompts, return_tensors="pt", **padding, **settings)


def layout_for(name: str, rows: Sequence[Sequence[Size]], inputs: Any = None) -> VisualLayout:
    model, processor = pair(name)
    return layout_of(model, processor, inputs_of(name, rows) if inputs is None else inputs, [list(row) for row in rows])


def without_tokens(views: Sequence[View]) -> list[View]:
    """Views with the number of their tokens only."""
    return [replace(view, tokens=torch.arange(view.tokens.numel()), image=0) for view in views]


def same(views: Sequence[View], others: Sequence[View]) -> bool:
    return [repr(view) for view in without_tokens(views)] == [repr(view) for view in without_tokens(others)]


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_a_batch_lie_as_each_alone(name: str) -> None:
    rows = (SIZES[:2], SIZES[2:3], (SIZES[3], SIZES[0], SIZES[1]))
    inputs = inputs_of(name, rows)
    layout = layout_for(name, rows, inputs)
    token = names.image_id(pair(name)[0].config)
    for number, row in enumerate(rows):
        views = layout.views[number]
        assert sorted({view.image for view in views}) == list(range(len(row)))
        tokens = torch.cat([view.tokens for view in views]).tolist()
        # In the order of the prompt, and of each image its own tokens.
        assert tokens == sorted(set(tokens))
        assert bool((inputs["input_ids"][number, tokens] == token).all())
        for index, size in enumerate(row):
            own = [view for view in views if view.image == index]
            if name in ONE_VIEW and len(row) > 1:
                assert [view.grid for view in own] == [(4, 4)]
                assert_square(own[0], size)
            else:
                assert same(own, layout_for(name, [[size]]).views[0]), f"row {number} image {index}"


def assert_square(view: View, size: Size) -> None:
    """The square around an image, with the image in its middle."""
    left, top, right, bottom = view.box
    assert right - left == bottom - top == max(size)
    assert (left + right) / 2 == pytest.approx(size[1] / 2, abs=0.5)
    assert (top + bottom) / 2 == pytest.approx(size[0] / 2, abs=0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_truncated_anywhere_is_refused(name: str) -> None:
    """Also between two tiles, where the rest may look like an image of fewer tiles."""
    rows = [SIZES[1:3]]
    inputs = inputs_of(name, rows)
    places = (inputs["input_ids"][0] == names.image_id(pair(name)[0].config)).nonzero().flatten()
    whole = layout_for(name, rows, inputs).tokens()
    first, last = int(places[0]), int(places[-1])
    for end in range(first + 1, last + 1, 1 + (last - first) // 400):
        for cut in (inputs["input_ids"][:, :end], inputs["input_ids"][:, end:]):
            with pytest.raises(ValueError, match=r"truncated|images: row 0|no image token"):
                layout_for(name, rows, {**inputs, "input_ids": cut})
    # Behind the mark at the end of the image.
    cut = inputs["input_ids"][:, : last + 2]
    assert torch.equal(layout_for(name, rows, {**inputs, "input_ids": cut}).tokens(), whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_too_many_or_too_few_images_are_refused(name: str) -> None:
    inputs = inputs_of(name, [SIZES[1:3]])
    for sizes in (SIZES[1:2], SIZES[1:4], SIZES[1:3] * 2):
        with pytest.raises(ValueError, match=r"^(images|inputs): "):
            layout_for(name, [sizes], inputs)
    batch = inputs_of(name, [SIZES[1:2], SIZES[2:3]])
    for rows in ([SIZES[1:3], ()], [SIZES[1:2], ()], [SIZES[1:2], SIZES[2:4]]):
        with pytest.raises(ValueError, match=r"^(images|inputs): "):
            layout_for(name, rows, batch)


def test_pages_of_one_run_each_have_their_tiles() -> None:
    """GOT-OCR2 has no text between the pages of a document."""
    model, processor = available("got_ocr2")
    sizes = [(400, 500), (300, 900)]
    pages, entries = [image_of(size) for size in sizes], {}
    settings = {"crop_to_patches": True, "max_patches": 4, "multi_page": True}
    inputs = processor(images=[pages], text=["<img><imgpad></img>x"], return_tensors="pt", **settings)
    with pytest.raises(ValueError, match=r"images: |inputs: "):
        layout_of(model, processor, inputs, [pages])
    entries = processor.image_processor(pages, crop_to_patches=True, max_patches=4)
    layout = layout_of(model, processor, {**inputs, "num_patches": entries["num_patches"]}, [pages])
    assert [sum(view.image == page for view in layout.views[0]) for page in (0, 1)] == list(entries["num_patches"])
    with pytest.raises(ValueError, match="pixel_values has 9 tiles, the prompts of 2"):
        layout_of(model, processor, {**inputs, "num_patches": [1, 1]}, [sizes])


def test_images_in_another_order_are_refused_where_sizes_came_back() -> None:
    for name in ("llava_next", "llava_onevision", "granite4_vision"):
        inputs = inputs_of(name, [SIZES[1:2], SIZES[2:3]])
        with pytest.raises(ValueError, match="images: image 1 is 201 x 75, that of the inputs is 60 x 233"):
            layout_for(name, [SIZES[2:3], SIZES[1:2]], inputs)


def test_more_patches_than_the_limit_are_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneVision's anyres_max_9 of larger checkpoints: 2 x 2 tiles of 16 patches become at most about 16."""
    model, processor = available("llava_onevision")
    monkeypatch.setattr(model.config, "vision_aspect_ratio", "anyres_max_1")
    with pytest.raises(ValueError, match="vision_aspect_ratio is 'anyres_max_9', expected 'anyres_max_1'"):
        layout_for("llava_onevision", [SIZES[3:]])
    monkeypatch.setattr(processor, "vision_aspect_ratio", "anyres_max_1")
    base, rows = layout_for("llava_onevision", [[(112, 112)]]).views[0]
    assert (base.grid, rows.grid, rows.box) == ((4, 4), (4, 4), (0, 0, 112, 112))


@pytest.mark.parametrize("name", ["internvl", "idefics3", "minicpmv4_6", "llava_next"])
def test_a_layout_costs_little(name: str) -> None:
    """At most 5 ms for an image, by the best of five."""
    inputs = inputs_of(name, [[(150, 233)]])
    spent = []
    for _ in range(5):
        start = time.process_time()
        layout_for(name, [[(150, 233)]], inputs)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.005
