"""Families with one grid an image and settings of a call: tokens lie where they are measured, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, layout_of
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.layouts.comparison import deviations
from carve_kernels.hf.layouts.measured import measure
from tests.hf.layouts.test_measured import TOLERANCE, photograph
from tests.hf.layouts.test_zoo import skip_unavailable
from tests.support.processors.kinds import pair, zoo_kind
from tests.support.processors.single import FUYU_READS, PIXTRAL_IS_BOUNDED

FEWER = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9}}
PAN_AND_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4}
CROP = {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}}
SIZES = [(112, 224), (84, 56), (97, 131), (40, 200)]

unbounded = pytest.mark.skipif(PIXTRAL_IS_BOUNDED, reason="the vision tower takes no image larger than its image_size")

# Each setting of a call, and in which of SIZES it is refused: none, all, or those listed.
MEASURED: list[Any] = [
    ("qwen2_vl", FEWER),
    ("qwen3_5", FEWER),
    ("glm46v", FEWER),
    ("muse_glimmer", {"max_image_tokens": 9}),
    ("hunyuan_vl", FEWER),
    ("video_llama_3", {"merge_size": 1}),
    ("paddleocr_vl", {"merge_size": 4}),
    ("gemma3", PAN_AND_SCAN),
    ("gemma3", {**PAN_AND_SCAN, "pan_and_scan_max_num_crops": 3}),
    ("gemma4", {"max_soft_tokens": 140}),
    ("gemma4_unified", {"patch_size": 28, "pooling_kernel_size": 1}),
    ("pixtral", {"size": {"longest_edge": 56}}),
    *(pytest.param(name, {"do_resize": False}, marks=unbounded) for name in ("pixtral", "mistral3")),
    ("lighton_ocr", {"patch_size": 14}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2_vl", {"patch_size": 16}, "^inputs: expected pixel_values of patches of 14 x 14"),
    (
        "qwen2_vl",
        {"merge_size": 1},
        "^inputs: (expected image_grid_thw of multiples of 2 x 2|pixel_values do not show)",
    ),
    ("qwen2_vl", {"merge_size": 3}, "^inputs: expected image_grid_thw of multiples of 2 x 2"),
    ("qwen2_vl", {"merge_size": 4}, "^inputs: pixel_values do not show"),
    ("kimi_k25", {"size": {"max_height": 4, "max_width": 4}}, "^inputs: expected a grid of"),
    ("llava", {"do_center_crop": False}, "^inputs: pixel_values are"),
    ("llava", {"size": {"shortest_edge": 84}}, "^inputs: pixel_values do not show"),
    ("llava", {"size": {"height": 56, "width": 56}, "do_center_crop": False}, "^inputs: pixel_values do not show"),
    ("paligemma", {"do_resize": False}, "^inputs: pixel_values are"),
    ("gemma4", {"pooling_kernel_size": 4}, "^inputs: row 0 has"),
    ("pixtral", CROP, "^inputs: (image_sizes has|pixel_values do not show)"),
    ("janus", {"do_pad": False}, "^inputs: expected square pixel_values"),
    ("janus", {"size": {"height": 28, "width": 28}}, "^inputs: row 0 has 16 image tokens, its grid of 2 x 2"),
]
# Where the shape is that of other settings, and of some sizes only.
SOMETIMES: list[tuple[str, dict[str, Any]]] = [
    ("llava", {"do_resize": False}),
    ("kimi_k25", {"max_patches": 16}),
    ("kimi_k25", {"max_patches": 100}),
    ("fuyu", {"size": {"height": 112, "width": 84}}),
    ("janus", {"do_resize": False}),
]


def inputs_of(name: str, image: Image.Image, settings: dict[str, Any]) -> Any:
    skip_unavailable(zoo_kind(name))
    processor = pair(name)[1]
    return processor(images=[image], text=[build_prompt(processor, "x")], return_tensors="pt", **settings)


def check(name: str, size: tuple[int, int], settings: dict[str, Any]) -> None:
    image = photograph(size)
    inputs = inputs_of(name, image, settings)
    model, processor = pair(name)
    off = deviations(layout_of(model, processor, inputs, [image]), measure(model, processor, size, settings=settings))
    assert len(off) > 0
    assert float(off.max()) <= TOLERANCE


@pytest.mark.parametrize(("name", "settings"), MEASURED, ids=str)
def test_tokens_lie_where_they_are_measured(name: str, settings: dict[str, Any]) -> None:
    for size in SIZES:
        check(name, size, settings)


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED, ids=str)
def test_settings_that_hide_where_tokens_lie_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    for size in SIZES:
        image = photograph(size)
        inputs = inputs_of(name, image, settings)
        with pytest.raises(ValueError, match=message):
            layout_of(*pair(name), inputs, [image])


@pytest.mark.parametrize(("name", "settings"), SOMETIMES, ids=str)
def test_no_box_is_wrong_where_settings_may_have_had_the_same_shape(name: str, settings: dict[str, Any]) -> None:
    refused = 0
    for size in [*SIZES, (56, 56)]:
        image = photograph(size)
        inputs = inputs_of(name, image, settings)
        try:
            layout_of(*pair(name), inputs, [image])
        except ValueError:
            refused += 1
        else:
            check(name, size, settings)
    assert 0 < refused < len(SIZES) + 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2_vl", {"image_processor.patch_size": 16}, r"image_processor\.patch_size is 16, expected 14"),
        ("qwen2_vl", {"image_processor.merge_size": 1}, r"image_processor\.merge_size is 1, expected 2"),
        ("kimi_k25", {"image_processor.merge_size": 1}, r"image_processor\.merge_size is 1, expected 2 "),
        (
            "hunyuan_vl",
            {"image_processor.spatial_patch_size": 2},
            r"image_processor\.spatial_patch_size is 2, expected 1",
        ),
        ("hunyuan_vl", {"cat_extra_token": False}, r"cat_extra_token is False, expected True"),
        (
            "gemma4",
            {"image_processor.pooling_kernel_size": 3},
            r"image_processor\.pooling_kernel_size is 3, expected 2",
        ),
        ("mistral3", {"spatial_merge_size": 1}, r"spatial_merge_size is 1, expected 2"),
        ("pixtral", {"patch_size": 16}, r"patch_size is 16, expected 14"),
        (
            "pixtral",
            {"image_processor.do_center_crop": True},
            r"image_processor\.do_center_crop is True, expected False",
        ),
        ("emu3", {"downsample_ratio": 8}, r"downsample_ratio is 8, expected 2"),
        ("vipllava", {"patch_size": None}, r"patch_size is None, expected 14"),
        ("fast_vlm", {"patch_size": None}, r"patch_size is None, expected the side of the cells"),
        (
            "fast_vlm",
            {"vision_feature_select_strategy": None},
            r"vision_feature_select_strategy is None, expected 'full'",
        ),
        ("llava_next", {"patch_size": None}, r"patch_size is None, expected 14"),
        (
            "llava_next",
            {"vision_feature_select_strategy": None},
            r"vision_feature_select_strategy is None, expected 'de",
        ),
        ("llava_next", {"num_additional_image_tokens": 0}, r"num_additional_image_tokens is 0, expected 1"),
        ("llava_onevision", {"num_image_tokens": None}, r"num_image_tokens is None, expected 16"),
        ("aya_vision", {"img_size": 364}, r"img_size is 364, expected 56"),
    ],
    ids=str,
)
def test_settings_of_the_processor_that_are_not_the_models(
    monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any], message: str
) -> None:
    image = photograph((97, 131))
    inputs = inputs_of(name, image, {})
    model, processor = pair(name)
    for path, value in change.items():
        owner, _, attribute = path.rpartition(".")
        monkeypatch.setattr(getattr(processor, owner) if owner else processor, attribute, value)
    with pytest.raises(ValueError, match=f"^processor: {message}"):
        layout_of(model, processor, inputs, [image])


def test_a_crop_is_seen_by_the_cells_that_differ_from_an_even_image() -> None:
    for edges in ((131, 0, 204, 640), (360, 384, 468, 500)):
        image = Image.new("RGB", (480, 640), "grey")
        image.paste("white", edges)
        with pytest.raises(ValueError, match=r"^inputs: pixel_values do not show the image of 640 x 480"):
            layout_of(*pair("llava"), inputs_of("llava", image, {"do_resize": False}), [image])
        assert layout_of(*pair("llava"), inputs_of("llava", image, {}), [image]).views


def test_another_image_of_the_same_size_is_refused() -> None:
    first, second = photograph((97, 131)), photograph((97, 131)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name in ("qwen2_vl", "llava", "pixtral", "janus", "emu3"):
        inputs = inputs_of(name, first, {})
        with pytest.raises(ValueError, match=r"^inputs: pixel_values do not show the image of 97 x 131"):
            layout_of(*pair(name), inputs, [second])
        # Of an image that is given as its size nothing is known.
        layout_of(*pair(name), inputs, [(97, 131)])


def test_a_later_image_of_fuyu_is_seen() -> None:
    images = [[photograph((97, 131))], [], [photograph((60, 200))]]
    model, processor = pair("fuyu")
    if FUYU_READS == "encode":
        pytest.skip("the processor leaves out a prompt without an image")
    inputs = processor(images=images, text=["x", "no image", "what"], return_tensors="pt")
    layout = layout_of(model, processor, inputs, images)
    assert [[view.grid for view in row] for row in layout.views] == [[(7, 10)], [], [(4, 12)]]
    turned = [*images[:2], [images[2][0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]]
    with pytest.raises(ValueError, match=r"^inputs: pixel_values do not show the image of 60 x 200"):
        layout_of(model, processor, inputs, turned)


@pytest.mark.parametrize(("mode", "values"), [("RGBA", 784), ("P", 196), ("L", 196), ("LA", 392)])
def test_fuyu_reads_three_channels(mode: str, values: int) -> None:
    """Its image processor keeps what an image has, which the model cannot read; the engine converts images."""
    model, processor = pair("fuyu")
    image = photograph((97, 131)).convert(mode)
    if FUYU_READS == "encode" and mode.endswith("A"):
        pytest.skip("the processor itself refuses transparency")
    inputs = inputs_of("fuyu", image, {})
    for given in (image, (97, 131)):
        with pytest.raises(ValueError, match=f"^inputs: expected image_patches of 3 channels of 14 x 14 .*{values} "):
            layout_of(model, processor, inputs, [given])
    preset = Preset.release(layers=[3], max_new_tokens=1, images="refined")
    assert CarveEngine(model, processor, preset=preset).ask(image, "x").layout.views[0][0].grid == (7, 10)


def test_a_width_that_is_less_than_a_cell_is_seen() -> None:
    image = photograph((228, 26))
    assert layout_of(*pair("deepseek_vl"), inputs_of("deepseek_vl", image, {}), [image]).views
    with pytest.raises(ValueError, match=r"^inputs: pixel_values do not show the image of 228 x 26"):
        layout_of(*pair("deepseek_vl"), inputs_of("deepseek_vl", image, {"min_size": 28}), [image])


@pytest.mark.parametrize("resample", [0, 1, 2])
def test_a_filter_of_a_call_has_a_layout(resample: int) -> None:
    for name, size in (("llava", (97, 131)), ("qwen2_vl", (20, 31)), ("emu3", (97, 131))):
        noise = Image.effect_noise((size[1], size[0]), 90).convert("RGB")
        assert layout_of(*pair(name), inputs_of(name, noise, {"resample": resample}), [noise]).views


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "P"])
def test_a_tiny_image_that_is_enlarged_has_a_layout(mode: str) -> None:
    """The filter reads pixels far from a cell."""
    image = photograph((5, 9)).convert(mode)
    assert layout_of(*pair("llava"), inputs_of("llava", image, {}), [image]).views


def test_a_transparent_image_is_seen() -> None:
    first, second = (photograph((97, 131)).convert("RGBA") for _ in range(2))
    for image in (first, second):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    second = second.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name in ("llava", "chameleon", "emu3"):
        inputs = inputs_of(name, first, {})
        assert layout_of(*pair(name), inputs, [first]).views
        with pytest.raises(ValueError, match=r"^inputs: pixel_values do not show the image of 97 x 131"):
            layout_of(*pair(name), inputs, [second])


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "janus", "pixtral"])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes_have_a_layout(name: str, mode: str) -> None:
    if name == "janus" and mode == "L":
        pytest.skip("transformers pads with three channels")
    image = photograph((97, 131)).convert(mode)
    assert layout_of(*pair(name), inputs_of(name, image, {"do_convert_rgb": True}), [image]).views


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "emu3"])
@pytest.mark.parametrize("settings", [{}, {"do_normalize": False}, {"do_rescale": False}], ids=str)
def test_a_normalisation_of_a_call_has_a_layout(name: str, settings: dict[str, Any]) -> None:
    for image in (photograph((97, 131)), Image.new("RGB", (97, 131), "white")):
        inputs = inputs_of(name, image, settings)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        assert layout_of(*pair(name), inputs, [image]).views
