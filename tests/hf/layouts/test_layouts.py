"""Layouts: positions of the image tokens, grids of the processor, and boxes that contain the planted square."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from carve_kernels import CarveEngine, layout_of
from carve_kernels.hf.model import image_token_positions
from carve_kernels.hf.profile.profile import Probe, profile
from tests.support import tiny_models

TEXTS = ["what digit is red", "x", "Write a general description of the image."]
IMAGES = [tiny_models.make_image(120, 60), tiny_models.make_image(90, 151, 1), tiny_models.make_image(201, 200, 2)]


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    return tiny_models.tiny_llava()


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    return tiny_models.tiny_qwen2_5_vl()


@pytest.fixture(scope="module", params=[tiny_models.tiny_llava, tiny_models.tiny_qwen2_vl, tiny_models.tiny_qwen2_5_vl])
def family(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.param()


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_the_image_tokens_of_each_row(family: tuple[Any, Any], side: str) -> None:
    model, processor = family
    inputs = tiny_models.inputs_for(processor, IMAGES, TEXTS, padding_side=side)
    layout = layout_of(model, processor, inputs, IMAGES)
    assert layout.sizes == (((60, 120),), ((151, 90),), ((200, 201),))
    positions = image_token_positions(model, inputs["input_ids"])
    for row, (view,) in enumerate(layout.views):
        expected = (inputs["input_ids"][row] == model.config.image_token_id).nonzero().flatten()
        assert torch.equal(view.tokens.long(), expected)
        assert torch.equal(view.tokens, positions[row])
        assert view.tokens.dtype == torch.int32
        assert (view.image, view.frame, view.kind) == (0, None, "base")


@pytest.mark.parametrize(("width", "height", "grid"), [(120, 60, (2, 4)), (90, 151, (5, 3)), (500, 125, (4, 16))])
def test_qwen_grid_is_the_processors_and_covers_the_whole_image(
    qwen: tuple[Any, Any], width: int, height: int, grid: tuple[int, int]
) -> None:
    model, processor = qwen
    image = tiny_models.make_image(width, height)
    layout = layout_of(model, processor, tiny_models.inputs_for(processor, [image], ["x"]), [image])
    view = layout.views[0][0]
    assert view.grid == grid
    assert view.box == (0, 0, width, height)


def test_several_images_in_a_row_and_rows_of_unequal_count(family: tuple[Any, Any]) -> None:
    model, processor = family
    rows = [[IMAGES[0], IMAGES[1]], [IMAGES[2]]]
    inputs = tiny_models.inputs_for(processor, rows, TEXTS[:2])
    layout = layout_of(model, processor, inputs, rows)
    assert [[view.image for view in row] for row in layout.views] == [[0, 1], [0]]
    for row, views in enumerate(layout.views):
        expected = (inputs["input_ids"][row] == model.config.image_token_id).nonzero().flatten()
        assert torch.equal(torch.cat([view.tokens for view in views]).long(), expected)


def test_two_adjacent_images_are_separated_by_their_grids(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    inputs = processor(images=IMAGES[:2], text=["<image><image> x"], return_tensors="pt")
    first, second = layout_of(model, processor, inputs, IMAGES[:2]).views[0]
    assert first.tokens[-1] + 1 == second.tokens[0]
    assert first.box != second.box


def test_a_row_without_image_has_no_views(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    inputs = tiny_models.inputs_for(processor, [[IMAGES[0]], []], TEXTS[:2])
    layout = layout_of(model, processor, inputs, [[IMAGES[0]], []])
    assert [len(row) for row in layout.views] == [1, 0]
    assert layout.tokens().shape == (2, 36)


def test_images_as_sizes_as_one_image_and_under_a_wrapper(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    inputs = tiny_models.inputs_for(processor, IMAGES[:1], ["x"])
    expected = layout_of(model, processor, inputs, [[IMAGES[0]]]).views[0][0]
    for images in (IMAGES[0], (60, 120), [(60, 120)], [[(60, 120)]]):
        view = layout_of(torch.nn.DataParallel(model), processor, inputs, images).views[0][0]
        assert view.box == expected.box
        assert torch.equal(view.tokens, expected.tokens)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_with_an_exif_orientation_is_refused(family: tuple[Any, Any], orientation: int) -> None:
    model, processor = family
    tagged = tiny_models.make_image(120, 60)
    tagged.getexif()[0x0112] = orientation
    inputs = tiny_models.inputs_for(processor, [tagged], ["x"])
    with pytest.raises(ValueError, match=r"^images: .*exif_transpose"):
        layout_of(model, processor, inputs, [tagged])
    stored = layout_of(model, processor, inputs, [(60, 120)])
    upright = ImageOps.exif_transpose(tagged)
    rotated = layout_of(model, processor, tiny_models.inputs_for(processor, [upright], ["x"]), [upright])
    assert (stored.sizes, rotated.sizes) == ((((60, 120),),), (((upright.height, upright.width),),))


@pytest.mark.parametrize("tags", [{}, {0x0112: 1}, {0x0112: 0}, {0x0112: 9}, {0x0131: "camera"}])
def test_other_exif_tags_are_ignored(llava: tuple[Any, Any], tags: dict[int, Any]) -> None:
    model, processor = llava
    image = tiny_models.make_image(120, 60)
    image.getexif().update(tags)
    assert layout_of(model, processor, tiny_models.inputs_for(processor, [image], ["x"]), [image]).sizes == (
        ((60, 120),),
    )


def test_a_file_that_its_decoder_rotates_has_the_rotated_size(llava: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = llava
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny_models.make_image(120, 60).save(tmp_path / "rotated.tiff", exif=exif)
    with Image.open(tmp_path / "rotated.tiff") as image, Image.open(tmp_path / "rotated.tiff") as other:
        inputs = tiny_models.inputs_for(processor, [image], ["x"])
        for each in (image, other):
            layout = layout_of(model, processor, inputs, [each])
            assert (layout.sizes, layout.views[0][0].box) == ((((120, 60),),), (0, 30, 60, 90))


@pytest.mark.parametrize("cell_index", [(0, 0), (1, 3), (3, 1), (2, 5)])
def test_each_token_covers_its_cell(family: tuple[Any, Any], cell_index: tuple[int, int]) -> None:
    model, processor = family
    image = tiny_models.make_image(168, 112)
    inputs = tiny_models.inputs_for(processor, [image], ["x"])
    view = layout_of(model, processor, inputs, [image]).views[0][0]
    (rows, columns), (left, top, right, bottom) = view.grid, view.box
    cell = (right - left) / columns, (bottom - top) / rows
    corner = left + cell_index[1] * cell[0], top + cell_index[0] * cell[1]
    changed = image.copy()
    ImageDraw.Draw(changed).rectangle(
        [corner[0] + 2, corner[1] + 2, corner[0] + cell[0] - 3, corner[1] + cell[1] - 3], fill="white"
    )
    before, after = (_embedded(model, tiny_models.inputs_for(processor, [each], ["x"])) for each in (image, changed))
    change = (after - before)[0, view.tokens.long()].norm(dim=-1)
    assert int(change.argmax()) == cell_index[0] * columns + cell_index[1]


def test_the_class_token_is_in_no_view() -> None:
    model, processor = tiny_models.tiny_llava(strategy="full")
    inputs = tiny_models.inputs_for(processor, IMAGES, TEXTS)
    for row, (view,) in enumerate(layout_of(model, processor, inputs, IMAGES).views):
        marked = (inputs["input_ids"][row] == model.config.image_token_id).nonzero().flatten()
        assert len(marked) == 37
        assert torch.equal(view.tokens.long(), marked[1:])


def test_no_image_in_the_prompt(family: tuple[Any, Any]) -> None:
    model, processor = family
    inputs = processor(text=["what digit is red"], return_tensors="pt")
    with pytest.raises(ValueError, match="no image token in the prompt"):
        layout_of(model, processor, inputs, [IMAGES[0]])


def test_images_that_do_not_match_the_inputs(family: tuple[Any, Any]) -> None:
    model, processor = family
    two = tiny_models.inputs_for(processor, [IMAGES[:2]], ["x"])
    with pytest.raises(ValueError, match=r"hold 2 image.*got 1; give every image .*view\.image"):
        layout_of(model, processor, two, [IMAGES[0]])
    rows = tiny_models.inputs_for(processor, [IMAGES[:2], IMAGES[2:]], TEXTS[:2])
    with pytest.raises(ValueError, match=r"row 0 has 2 image.*got 1; give the images of each row"):
        layout_of(model, processor, rows, [IMAGES[:1], IMAGES[1:]])
    with pytest.raises(ValueError, match=r"each of the 2 row.*got 3"):
        layout_of(model, processor, rows, IMAGES)


@pytest.mark.parametrize("keep", [20, 1])
def test_a_truncated_prompt(family: tuple[Any, Any], keep: int) -> None:
    model, processor = family
    inputs = tiny_models.inputs_for(processor, [IMAGES[2]], ["x"])
    needs = int((inputs["input_ids"] == model.config.image_token_id).sum())
    end = int((inputs["input_ids"] == model.config.image_token_id).nonzero()[0, 1]) + keep
    inputs["input_ids"] = inputs["input_ids"][:, :end]
    with pytest.raises(
        ValueError, match=f"row 0 has {keep} image tokens, its grid of . x . needs {needs}; .*truncated"
    ):
        layout_of(model, processor, inputs, [IMAGES[2]])


def test_one_token_too_many(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    inputs = tiny_models.inputs_for(processor, [IMAGES[0]], ["x"])
    extra = torch.full((1, 1), model.config.image_token_id)
    first = int((inputs["input_ids"] == model.config.image_token_id).nonzero()[0, 1])
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :first], extra, inputs["input_ids"][:, first:]], dim=1)
    with pytest.raises(ValueError, match=r"37 image tokens.*6 x 6 needs 36"):
        layout_of(model, processor, inputs, [IMAGES[0]])


FAULTS = [
    ("patch_size", {"patch_size": None}),
    ("patch_size", {"patch_size": 16}),
    ("vision_feature_select_strategy", {"vision_feature_select_strategy": None}),
    ("vision_feature_select_strategy", {"vision_feature_select_strategy": "full"}),
    ("num_additional_image_tokens", {"num_additional_image_tokens": 0}),
    ("num_additional_image_tokens", {"num_additional_image_tokens": None}),
    ("patch_size", {"patch_size": None, "vision_feature_select_strategy": None, "num_additional_image_tokens": 0}),
    ("its image token", {"image_token_id": 5}),
]


@pytest.mark.parametrize(("name", "settings"), FAULTS)
def test_settings_of_a_processor_that_disagree_with_the_model(name: str, settings: dict[str, Any]) -> None:
    model, processor = tiny_models.tiny_llava()
    inputs = tiny_models.inputs_for(processor, [IMAGES[0]], ["x"])
    for key, value in settings.items():
        setattr(processor, key, value)
    with pytest.raises(ValueError, match=f"^processor: {name}"):
        layout_of(model, processor, inputs, [IMAGES[0]])
    # Neither the model nor the processor runs.
    processor.image_processor, model.forward = None, None
    with pytest.raises(ValueError, match=f"^processor: {name}"):
        CarveEngine(model, processor, preset={"layers": [1]})(IMAGES[0], "x")
    with pytest.raises(ValueError, match=f"^processor: {name}"):
        profile(model, processor, [Probe(IMAGES[0], "x")], preset={"layers": [1]})


@pytest.mark.parametrize("name", ["patch_size", "merge_size"])
def test_settings_of_an_image_processor_that_disagree_with_the_model(name: str) -> None:
    model, processor = tiny_models.tiny_qwen2_5_vl()
    setattr(processor.image_processor, name, 28)
    with pytest.raises(ValueError, match=rf"^processor: image_processor\.{name} is 28"):
        CarveEngine(model, processor, preset={"layers": [1]})(IMAGES[0], "x")


def test_an_old_processor_that_counts_correctly_is_accepted(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    older = copy.copy(processor)
    older.vision_feature_select_strategy, older.num_additional_image_tokens = None, 0
    expected, found = (tiny_models.inputs_for(each, [IMAGES[0]], ["x"]) for each in (processor, older))
    assert torch.equal(expected["input_ids"], found["input_ids"])
    views = [layout_of(model, each, found, [IMAGES[0]]).views[0][0] for each in (processor, older)]
    assert torch.equal(views[0].tokens, views[1].tokens) and views[0].box == views[1].box


def test_inputs_that_lack_an_entry(family: tuple[Any, Any]) -> None:
    model, processor = family
    inputs = dict(tiny_models.inputs_for(processor, [IMAGES[0]], ["x"]))
    with pytest.raises(ValueError, match="video"):
        layout_of(model, processor, {**inputs, "pixel_values_videos": torch.zeros(1)}, [IMAGES[0]])
    del inputs["pixel_values"]
    inputs.pop("image_grid_thw", None)
    with pytest.raises(ValueError, match=r"expected '(pixel_values|image_grid_thw)' from the processor, got attention"):
        layout_of(model, processor, inputs, [IMAGES[0]])


@pytest.mark.parametrize("images", ["x.png", None, 3])
def test_images_of_a_wrong_type(llava: tuple[Any, Any], images: Any) -> None:
    model, processor = llava
    with pytest.raises(TypeError, match="images: expected"):
        layout_of(model, processor, tiny_models.inputs_for(processor, [IMAGES[0]], ["x"]), images)


def test_settings_that_differ_from_those_of_the_inputs(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    inputs = tiny_models.inputs_for(processor, [IMAGES[0]], ["x"])
    unknown: dict[str, Any] = {
        r"84 x 84, but .* make 70 x 70": {"crop_size": {"height": 70, "width": 70}},
        "the size .* is not supported": {"size": {"max_height": 84, "max_width": 84}},
        "the padding of": {"do_pad": True},
    }
    for message, settings in unknown.items():
        other = tiny_models.tiny_llava(**settings)[1]
        with pytest.raises(ValueError, match=message):
            layout_of(model, other, inputs, [IMAGES[0]])
    with pytest.raises(ValueError, match=r"pixel_values of shape \[images, 3, H, W\]"):
        layout_of(model, processor, {**inputs, "pixel_values": torch.zeros(4, 588)}, [IMAGES[0]])


def test_an_unsupported_family() -> None:
    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"^model: the config of 'llama' names no image token, .* qwen2_5_vl, "):
        layout_of(tiny_models.tiny_llama(), None, inputs, [(3, 3)])


def _embedded(model: Any, inputs: Any) -> torch.Tensor:
    """The inputs of the text decoder."""
    embeds = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(**inputs)
    return embeds[0]
