"""Families with several views of an image: layouts fit what settings that are given to one call change."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from carve_kernels import VisualLayout, layout_of
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.layouts.comparison import deviations
from carve_kernels.hf.layouts.measured import measure
from carve_kernels.types import Size, View
from tests.support.processors.kinds import pair, zoo_kind

# In cells.
TOLERANCE = 0.05
LARGE: Size = (113, 225)
SIZES: tuple[Size, ...] = (LARGE, (151, 97), (64, 200))
# The first of each family in `make test`.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "aya_vision": ({"max_patches": 9}, {"crop_to_patches": False}, {"min_patches": 4}),
    "cohere2_vision": ({"max_patches": 12}, {"crop_to_patches": False}, {"max_patches": 2}),
    "got_ocr2": ({"crop_to_patches": True, "max_patches": 3},),
    "granite4_vision": ({"do_resize": False},),
    "granite_docling": ({"max_patches": 9}, {"crop_to_patches": False}, {"fine_route": True}),
    "idefics3": (
        {"size": {"longest_edge": 160}},
        {"do_image_splitting": False},
        {"do_resize": False},
        {"do_pad": False},
    ),
    "internvl": (
        {"min_patches": 5, "max_patches": 5},
        {"crop_to_patches": False},
        {"max_patches": 2},
        {"min_patches": 8, "max_patches": 12},
    ),
    "lfm2_vl": (
        {"use_thumbnail": False},
        {"min_tiles": 1, "max_tiles": 1},
        {"min_tiles": 4, "max_tiles": 8},
        {"max_image_tokens": 4},
    ),
    "llama4": ({"resize_to_max_canvas": True}, {"max_patches": 2}),
    "llava_next": ({"do_pad": False}, {"do_center_crop": False}),
    "llava_next_video": ({"do_pad": False},),
    "llava_onevision": ({"do_pad": False},),
    "minicpm_ocr": ({"max_slice_nums": 3}, {"small_image_upsize": "never"}),
    "minicpmv4_6": ({"scale_resolution": 56}, {"max_slice_nums": 3}, {"slice_mode": False}, {"use_image_id": False}),
    "minicpmv4_7": ({"max_slice_nums": 4},),
    "molmo2": ({"max_crops": 12, "overlap_margins": [0, 0]}, {"max_crops": 2}),
    "ovis2": (
        {"use_covering_area_grid": False, "min_patches": 4, "max_patches": 9},
        {"crop_to_patches": False},
        {"max_patches": 3},
    ),
    "phi4_multimodal": ({"dynamic_hd": 2},),
    "qianfan_ocr": ({"max_patches": 3}, {"crop_to_patches": False}),
    "smolvlm": ({"size": {"longest_edge": 48}}, {"do_image_splitting": False}),
}
UNNORMALISED: dict[str, Any] = {"do_normalize": False}
CASES = [
    pytest.param(name, settings, id=f"{name}-{settings}", marks=pytest.mark.slow if number else ())
    for name, each in SETTINGS.items()
    for number, settings in enumerate(each)
]


def available(name: str) -> tuple[Any, Any]:
    """A model and its processor. Llama 4 itself fails with an image in 5.24.0, its tower and its layout do not."""
    if not zoo_kind(name).exists():
        pytest.skip(f"transformers {transformers.__version__} has no {zoo_kind(name).class_name}")
    return pair(name)


def processed(name: str, size: Size, settings: Mapping[str, Any]) -> tuple[Any, VisualLayout]:
    model, processor = available(name)
    image = Image.effect_noise((size[1], size[0]), 90).convert("RGB")
    inputs = processor(images=[image], text=[build_prompt(processor, "x")], return_tensors="pt", **settings)
    return inputs, layout_of(model, processor, inputs, [image])


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_token_lies_where_it_is_measured(name: str, settings: dict[str, Any]) -> None:
    for size in SIZES if settings != SETTINGS[name][0] else SIZES[:1]:
        layout = processed(name, size, settings)[1]
        model, processor = pair(name)
        off = deviations(layout, measure(model, processor, size, settings=settings))
        assert float(off.max()) <= TOLERANCE, f"{size}: token {int(off.argmax())} is {float(off.max()):.3f} cells off"


@pytest.mark.parametrize(("name", "views"), [("minicpmv4_6", 3), ("minicpmv4_7", 3)])
def test_four_times_as_many_tokens_a_slice(name: str, views: int) -> None:
    """The model takes downsample_mode, too, which is why it cannot be measured."""
    (inputs, many), (_, few) = processed(name, LARGE, {"downsample_mode": "4x"}), processed(name, LARGE, {})
    assert len(many.views[0]) == len(few.views[0]) == views
    shapes = inputs["target_sizes"].tolist()
    assert [view.grid for view in many.views[0]] == [(rows // 2, columns // 2) for rows, columns in shapes]
    assert [view.box for view in many.views[0]] == [view.box for view in few.views[0]]


def test_tokens_of_a_tile_without_marks_are_those_of_an_image_without_tiles_only() -> None:
    unmarked = {"use_image_special_tokens": False}
    _, layout = processed("lfm2_vl", (60, 64), unmarked)
    assert [(view.kind, view.box) for view in layout.views[0]] == [("base", (0, 0, 64, 60))]
    with pytest.raises(ValueError, match="inputs: the prompt has 11 image tokens in a run, a tile needs"):
        processed("lfm2_vl", LARGE, unmarked)


def test_other_canvases_than_the_models_are_refused() -> None:
    for name in ("llava_next", "llava_onevision"):
        with pytest.raises(ValueError, match="image_grid_pinpoints of the model's config"):
            processed(name, (97, 131), {"image_grid_pinpoints": [[56, 112]]})


@pytest.mark.parametrize("name", ["llava_next", "granite4_vision"])
def test_a_crop_that_is_given_to_a_call_is_seen(name: str) -> None:
    with pytest.raises(ValueError, match="pixel_values do not show the image of 113 x 225"):
        processed(name, LARGE, {"size": {"shortest_edge": 70}})


def test_every_other_pixel_of_a_row_is_compared_exactly() -> None:
    """The mean over whole pixels, which is compared first, differs too much."""
    model, processor = available("llava_onevision")
    image = Image.new("RGB", (200, 9), "grey")
    for column in range(0, 200, 2):
        image.putpixel((column, 5), (255, 255, 255))
    inputs = processor(images=[image], text=[build_prompt(processor, "x")], return_tensors="pt")
    assert layout_of(model, processor, inputs, [image]).views
    with pytest.raises(ValueError, match="pixel_values do not show the image of 9 x 200"):
        layout_of(model, processor, inputs, [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])


def test_tiles_of_another_size_than_that_of_the_base_are_seen() -> None:
    with pytest.raises(ValueError, match="pixel_values do not show the image of 104 x 674"):
        processed("llava_onevision", (104, 674), {"crop_size": {"height": 84, "width": 28}})


def test_padding_beside_a_tiny_image_of_several_is_not_compared() -> None:
    """They are padded to squares and resized then, so that the filter reads padding."""
    model, processor = available("llava_onevision")
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((18, 6), (180, 60), (9, 5), (17, 40))]
    inputs = processor(images=[images], text=[build_prompt(processor, "x", len(images))], return_tensors="pt")
    assert len(layout_of(model, processor, inputs, [images]).views[0]) == len(images)
    images[1] = images[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with pytest.raises(ValueError, match="pixel_values do not show the image of 60 x 180"):
        layout_of(model, processor, inputs, [images])


@pytest.mark.parametrize("size", [LARGE, (300, 290), (301, 75)])
def test_pixels_that_make_no_whole_patch_have_no_token(size: Size) -> None:
    """As in OneVision, whose tiles have 384 pixels and patches of 14."""
    model, processor = remaining_pixels()
    image = Image.effect_noise((size[1], size[0]), 90).convert("RGB")
    inputs = processor(images=[image], text=[build_prompt(processor, "x")], return_tensors="pt")
    layout = layout_of(model, processor, inputs, [image])
    assert float(deviations(layout, measure(model, processor, size)).max()) <= TOLERANCE


@functools.cache
def remaining_pixels(limit: str = "anyres_max_9", most: int = 2) -> tuple[Any, Any]:
    """A model and its processor with tiles of 60 pixels, at most so many a side, and patches of 14."""
    model, processor = available("llava_onevision")
    config, found = copy.deepcopy(model.config), copy.copy(processor)
    config.vision_config.image_size = 60
    config.image_grid_pinpoints = [
        [60 * rows, 60 * columns] for rows, columns in product(range(1, most + 1), repeat=2)
    ][1:]
    config.vision_aspect_ratio = found.vision_aspect_ratio = limit
    found.image_processor = copy.deepcopy(processor.image_processor)
    found.image_processor.size = type(processor.image_processor.size)(height=60, width=60)
    found.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(model)(config).float().eval(), found


@pytest.mark.parametrize("limit", ["anyres_max_1", "anyres_max_2"])
def test_cells_are_where_the_model_interpolates_its_patches(limit: str) -> None:
    """The model's own function is given the place of each patch in place of its features."""
    model, processor = remaining_pixels(limit, 4)
    tile = model.config.vision_config.image_size
    inner = 14 * torch.arange(4).double() + 7
    for size in ((tile * 2, tile * 4), (tile * 3, tile * 3), (tile * 4, tile)):
        image = Image.effect_noise((size[1], size[0]), 90).convert("RGB")
        inputs = processor(images=[image], text=[build_prompt(processor, "x")], return_tensors="pt")
        views = layout_of(model, processor, inputs, [image]).views[0][1:]
        starts = torch.cartesian_prod(*(tile * torch.arange(side // tile).double() for side in size))
        places = torch.cat([starts[:1], starts])[:, None] + torch.cartesian_prod(inner, inner)
        packed = model.model.pack_image_features(
            [places], inputs["image_sizes"], torch.full((2,), torch.nan, dtype=torch.float64), limit
        )[0][0]
        rows = packed[16:][packed[16:].isfinite().all(1)]
        tokens = torch.cat([view.tokens for view in views])
        middles = torch.cat([middles_of(view) for view in views])[tokens.argsort()]
        assert len(rows) == len(middles) < 16 * len(starts)
        assert float((rows - middles).abs().max()) < 1e-6


def middles_of(view: View) -> torch.Tensor:
    """The (y, x) of the middles of a view's cells, [N, 2]."""
    left, top, right, bottom = view.box
    sides = ((top, bottom, view.grid[0]), (left, right, view.grid[1]))
    return torch.cartesian_prod(
        *(start + (torch.arange(count).double() + 0.5) * (end - start) / count for start, end, count in sides)
    )


def test_other_pooling_than_the_processors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pooling_size is \[2, 2\], the inputs have 9 patches"):
        processed("molmo2", LARGE, {"pooling_size": [3, 3]})


def test_tiles_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="image tokens in a run, expected a multiple of 9"):
        processed("internvl", LARGE, {"size": {"height": 84, "width": 84}})
    with pytest.raises(ValueError, match="square tiles in pixel_values, got 56 x 112"):
        processed("internvl", LARGE, {"size": {"height": 56, "width": 112}})
    with pytest.raises(ValueError, match="expected tiles of 56 pixels as in the model's config, got 84 x 84"):
        processed("llava_onevision", LARGE, {"size": {"height": 84, "width": 84}})


def test_the_canvas_of_an_enlarged_image_is_known_by_its_pixels() -> None:
    """The image is below the size of its canvas: it is enlarged to a tile at most, or to the canvas."""
    model, processor = available("llama4")
    for enlarge, bottom in ((False, 112), (True, 112 * 80 / 89)):
        _, layout = processed("llama4", (80, 50), {"resize_to_max_canvas": enlarge, "max_patches": 2})
        assert max(view.box[3] for view in layout.views[0]) == pytest.approx(bottom)
    # Black is another number then.
    for size in ((24, 225), (80, 50)):
        boxes = [[view.box for view in processed("llama4", size, more)[1].views[0]] for more in ({}, UNNORMALISED)]
        assert boxes[0] == boxes[1]
    black = Image.new("RGB", (50, 80))
    inputs = processor(images=[black], text=[build_prompt(processor, "x")], return_tensors="pt", max_patches=2)
    assert layout_of(model, processor, inputs, [black]).views[0][0].box == (0, 0, 56, 56)
    processor.image_processor.resize_to_max_canvas = True
    try:
        with pytest.raises(ValueError, match="resize_to_max_canvas"):
            layout_of(model, processor, inputs, [black])
    finally:
        processor.image_processor.resize_to_max_canvas = False


def test_newlines_and_separators_are_in_no_view() -> None:
    for name, newlines in (("llava_next", 4), ("llava_onevision", 4), ("granite4_vision", 2)):
        inputs, layout = processed(name, (112, 224), {})
        tokens = layout.tokens()
        assert int((inputs["input_ids"] == 300).sum()) == tokens.numel() + newlines
        assert bool((inputs["input_ids"][0][tokens.long()] == 300).all())
        # One behind each row: the last token of the run is one.
        assert int(tokens.max()) == int((inputs["input_ids"] == 300).nonzero()[-1, 1]) - 1
    inputs, layout = processed("molmo2", LARGE, {})
    assert int(inputs["mm_token_type_ids"].sum()) > layout.tokens().numel()
    assert torch.equal(
        inputs["input_ids"][0] == 300, torch.isin(torch.arange(inputs["input_ids"].shape[1]), layout.tokens())
    )
