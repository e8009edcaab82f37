"""Families with one grid an image: which tokens are whose, in prompts with several images and in batches."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carve_kernels import VisualLayout, layout_of
from carve_kernels.hf import names
from carve_kernels.hf.families import FAMILIES
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.model import image_token_positions
from tests.hf.layouts.test_measured import photograph
from tests.hf.layouts.test_zoo import skip_unavailable
from tests.support.processors import single
from tests.support.processors.kinds import pair, pairs, zoo_kind
from tests.support.zoo.kinds import build, kinds

SINGLE = [name for name, made in pairs().items() if getattr(made.make, "__module__", "") == single.__name__]
PLACED = [name for name in SINGLE if name not in ("idefics2", "aria", "deepseek_ocr2")]
# Fuyu takes one image a prompt, PaliGemma's images stand first.
SEVERAL = [name for name in PLACED if name != "fuyu"]
PAN_AND_SCAN: dict[str, Any] = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 16,
    "pan_and_scan_max_num_crops": 4,
}
WIDE, TALL, ODD = (60, 200), (131, 90), (97, 98)


@functools.cache
def of_one(name: str, size: tuple[int, int]) -> tuple[list[int], Any]:
    """The tokens of one image alone from its first one, and its view."""
    (view,) = arranged(name, [[size]])[1].views[0]
    return (view.tokens - view.tokens[0]).tolist(), view


def inputs_of(name: str, rows: list[list[tuple[int, int]]], side: str = "left", **settings: Any) -> Any:
    skip_unavailable(zoo_kind(name))
    processor = pair(name)[1]
    texts = [build_prompt(processor, "x" * (index + 1), len(row)) for index, row in enumerate(rows)]
    images = [[photograph(size) for size in row] for row in rows]
    processor.tokenizer.padding_side = side
    return processor(
        images=images if len(rows) > 1 else images[0], text=texts, return_tensors="pt", padding=True, **settings
    )


def arranged(
    name: str, rows: list[list[tuple[int, int]]], side: str = "left", **settings: Any
) -> tuple[Any, VisualLayout]:
    inputs = inputs_of(name, rows, side, **settings)
    return inputs, layout_of(*pair(name), inputs, [[photograph(size) for size in row] for row in rows])


@pytest.mark.parametrize("name", SEVERAL)
def test_several_images_a_row_and_rows_of_unequal_length(name: str) -> None:
    if name == "got_ocr2":
        pytest.skip("its processor takes one image a prompt")
    rows = [[WIDE, TALL], [ODD]]
    for side in ("left", "right"):
        inputs, layout = arranged(name, rows, side)
        for row, sizes in enumerate(rows):
            is_image = inputs["input_ids"][row] == names.image_id(pair(name)[0].config)
            for view, size in zip(layout.views[row], sizes, strict=True):
                tokens, alone = of_one(name, size)
                assert bool(is_image[view.tokens.long()].all())
                assert (view.tokens - view.tokens[0]).tolist() == tokens
                assert (view.grid, view.box) == (alone.grid, alone.box)
            firsts = [int(view.tokens[0]) for view in layout.views[row]]
            assert firsts == sorted(firsts)


@pytest.mark.parametrize("name", SEVERAL)
def test_an_image_too_many_too_few_or_cut_off(name: str) -> None:
    model, processor = pair(name)
    inputs = inputs_of(name, [[WIDE]])
    with pytest.raises(ValueError, match=r"^(images|inputs): "):
        layout_of(model, processor, inputs, [photograph(WIDE), photograph(WIDE)])
    if name != "got_ocr2":
        both = inputs_of(name, [[WIDE, WIDE]])
        with pytest.raises(ValueError, match=r"^(images|inputs): "):
            layout_of(model, processor, both, [photograph(WIDE)])
    places = (inputs["input_ids"][0] == names.image_id(model.config)).nonzero().flatten()
    for last in (int(places[-2]), int(places[0])):
        cut = {**inputs, "input_ids": inputs["input_ids"][:, : last + 1]}
        with pytest.raises(ValueError, match=r"^inputs: .*(truncated|needs)"):
            layout_of(model, processor, cut, [photograph(WIDE)])


@pytest.mark.parametrize("name", PLACED)
def test_all_image_tokens_but_those_between_rows_are_in_a_view(name: str) -> None:
    inputs, layout = arranged(name, [[TALL]])
    (view,) = layout.views[0]
    found = image_token_positions(pair(name)[0], inputs["input_ids"])[0].tolist()
    rows, columns = view.grid
    extra = {"hunyuan_vl": rows + 2, "emu3": rows}.get(name, 0)
    assert len(found) == rows * columns + extra
    assert set(view.tokens.tolist()) <= set(found)
    # Row by row, with a token between rows: a newline of the run, or a break of the prompt.
    steps = view.tokens.diff().view(-1)[columns - 1 :: columns].tolist()
    between = name in ("hunyuan_vl", "emu3", "mistral3", "pixtral", "fuyu")
    assert set(steps) <= {2 if between else 1}


@pytest.mark.parametrize("given", [False, True])
def test_pan_and_scan_of_several_images(given: bool) -> None:
    rows = [[WIDE, ODD], [TALL], [ODD, WIDE, WIDE]]
    inputs = inputs_of("gemma3", rows, **PAN_AND_SCAN)
    if given:
        inputs["num_crops"] = [3, 0, 2, 0, 3, 3]
    layout = layout_of(*pair("gemma3"), inputs, [[photograph(size) for size in row] for row in rows])
    kind = [[(view.image, view.kind) for view in views] for views in layout.views]
    crops = [(0, "base"), *[(0, "crop")] * 3]
    assert kind[0] == [*crops, (1, "base")]
    assert kind[1] == [(0, "base"), (0, "crop"), (0, "crop")]
    assert kind[2] == [(0, "base"), (1, "base"), *[(1, "crop")] * 3, (2, "base"), *[(2, "crop")] * 3]
    assert [view.box for view in layout.views[0]] == [
        (0, 0, 200, 60), (0, 0, 67, 60), (67, 0, 134, 60), (134, 0, 200, 60), (0, 0, 98, 97)
    ]  # fmt: skip
    for row, views in enumerate(layout.views):
        tokens = torch.cat([view.tokens for view in views])
        assert tokens.tolist() == (inputs["input_ids"][row] == 300).nonzero().flatten().tolist()


def test_a_prompt_cut_between_crops_is_refused() -> None:
    inputs = inputs_of("gemma3", [[WIDE]], **PAN_AND_SCAN)
    places = (inputs["input_ids"][0] == 300).nonzero().flatten().tolist()
    cut = {**inputs, "input_ids": inputs["input_ids"][:, : places[7] + 1]}
    with pytest.raises(ValueError, match=r"^inputs: pixel_values hold 3 crops of the last image, the prompt has 1"):
        layout_of(*pair("gemma3"), cut, [photograph(WIDE)])


@pytest.mark.parametrize("name", ["chameleon", "emu3", "kimi_k25"])
@pytest.mark.parametrize("size", [(60, 333), (301, 75), (20, 31), (97, 131), (200, 200)], ids=str)
def test_each_cell_shows_its_part_of_an_image_of_coordinates(name: str, size: tuple[int, int]) -> None:
    """For codes, whose boxes cannot be measured, and where the padding is wider than cells."""
    skip_unavailable(zoo_kind(name))
    model, processor = pair(name)
    height, width = size
    down, across = np.meshgrid(np.linspace(55, 200, height), np.linspace(55, 200, width), indexing="ij")
    image = Image.fromarray(np.stack([across, down, np.full(size, 255.0)], -1).round().astype(np.uint8))
    inputs = processor(
        images=[image], text=[build_prompt(processor, "x")], return_tensors="pt", do_normalize=False, do_rescale=False
    )
    (view,) = layout_of(model, processor, inputs, [image]).views[0]
    (rows, columns), (left, top, right, bottom) = view.grid, view.box
    pixels = inputs["pixel_values"]
    if name == "kimi_k25":
        pixels = pixels.view(rows * 2, columns * 2, 3, 14, 14).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]
    cell = pixels.shape[2] // rows, pixels.shape[3] // columns
    means = pixels[0, :, : rows * cell[0], : columns * cell[1]].float()
    means = means.view(3, rows, cell[0], columns, cell[1]).mean((2, 4))
    checked = 0
    for row in range(rows):
        for column in range(columns):
            # Away from the edges, at which the resize smears the padding or repeats the last pixels.
            box = [left + (right - left) * (column + share) / columns for share in (0, 1)]
            box += [top + (bottom - top) * (row + share) / rows for share in (0, 1)]
            if box[0] < 3 or box[1] > width - 3 or box[2] < 3 or box[3] > height - 3:
                continue
            x = (float(means[0, row, column]) - 55) / 145 * (width - 1) + 0.5
            y = (float(means[1, row, column]) - 55) / 145 * (height - 1) + 0.5
            assert abs(x - (box[0] + box[1]) / 2) < 0.05 * (box[1] - box[0]) + width / 290
            assert abs(y - (box[2] + box[3]) / 2) < 0.05 * (box[3] - box[2]) + height / 290
            checked += 1
    assert checked or min(size) < 40


@pytest.mark.parametrize("name", ["janus", "deepseek_vl", "deepseek_vl_hybrid"])
@pytest.mark.parametrize("size", [(60, 333), (301, 75), (1, 90), (333, 20), (60, 61)], ids=str)
def test_the_image_begins_and_ends_where_its_square_says(name: str, size: tuple[int, int]) -> None:
    """Where bars are wider than cells, boxes cannot be measured."""
    model, processor = pair(name)
    image = Image.new("RGB", (size[1], size[0]), "white")
    inputs = processor(
        images=[image], text=[build_prompt(processor, "x")], return_tensors="pt", do_normalize=False, do_rescale=False
    )
    (view,) = layout_of(model, processor, inputs, [image]).views[0]
    inside = inputs["high_res_pixel_values" if "high_res_pixel_values" in inputs else "pixel_values"][0, 0] > 250
    left, top, right, bottom = view.box
    for (start, end), length, lines in (
        ((top, bottom), size[0], inside.any(1)),
        ((left, right), size[1], inside.any(0)),
    ):
        bright = lines.nonzero().flatten()
        per_pixel = (end - start) / len(lines)
        assert start + int(bright[0]) * per_pixel == pytest.approx(0, abs=1e-6)
        assert start + (int(bright[-1]) + 1) * per_pixel == pytest.approx(length, abs=1e-6)


@pytest.mark.parametrize("name", kinds())
def test_families_without_places_are_refused_and_image_tokens_are_found(name: str) -> None:
    skip_unavailable(kinds()[name])
    model, inputs, columns = build(name)
    if name != "phi4_multimodal":
        assert image_token_positions(model, inputs["input_ids"])[0].tolist() == columns
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.reason is not None:
        with pytest.raises(
            (TypeError, ValueError), match=r"^model: .*(no place in the image|cross-attention|encoder-decoder)"
        ):
            layout_of(model, None, inputs, [(56, 56)])
