"""fit="pad" crops nothing and keeps maps in pixels of the image; without it, a result has the share that is unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from carve_kernels import CarveEngine, Preset, capture_attention, carve, layout_of
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.layouts import canvas_of
from carve_kernels.types import View, VisualLayout
from tests.support import tiny_models
from tests.support.families import family, generate

QUESTION = "what digit is red"
QUICK = Preset.paper(layers=(1, 2), max_new_tokens=2)
WIDE = tiny_models.make_image(200, 120, 5)
SHAPES = {
    "clip": {},
    "smaller crop": {"size": {"shortest_edge": 112}, "crop_size": {"height": 84, "width": 84}},
    "rest of a patch": {"size": {"shortest_edge": 112}, "crop_size": {"height": 73, "width": 90}},
    "larger crop": {"size": {"shortest_edge": 61}, "crop_size": {"height": 84, "width": 210}},
    "stretched, then cropped": {"size": {"height": 90, "width": 120}},
    "stretched": {"size": {"height": 84, "width": 84}, "do_center_crop": False},
}

edges = st.integers(-6, 26) | st.floats(-6, 26)


def layout(boxes: list[Any], width: int, height: int) -> VisualLayout:
    views = tuple(View(torch.zeros(1, dtype=torch.int32), (1, 1), box) for box in boxes)
    return VisualLayout((views,), (((height, width),),))


@given(
    st.lists(st.tuples(*[st.integers(-6, 26)] * 4).filter(lambda box: box[0] < box[2] and box[1] < box[3]), max_size=5),
    st.integers(1, 20),
    st.integers(1, 20),
)
@example([(0, 0, 5, 4), (5, 0, 9, 4)], 9, 4)
@example([], 3, 2)
def test_unseen_is_the_share_of_uncovered_pixels(boxes: list[Any], width: int, height: int) -> None:
    covered = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        covered[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = True
    expected = int((~covered).sum()) / (width * height)
    assert layout(boxes, width, height).unseen() == pytest.approx(expected, rel=1e-12, abs=0)


@given(st.tuples(edges, edges), st.integers(1, 20), st.integers(1, 20))
def test_unseen_is_exact_between_pixels_and_zero_if_all_is_covered(
    ends: tuple[float, float], width: int, height: int
) -> None:
    first, end = sorted(ends)
    covered = max(0.0, min(end, width) - max(first, 0.0)) if first < end else 0.0
    unseen = layout([(first, -1.5, end, height + 0.25)] if first < end else [], width, height).unseen()
    assert unseen == pytest.approx(1 - covered / width, rel=1e-9, abs=1e-12)
    middle = min(max(end, 0.0), width)
    assert layout([(-3.0, 0, middle, height), (middle, 0, width, height)], width, height).unseen() == 0.0


def test_unseen_counts_the_views_of_one_image_only() -> None:
    token = torch.zeros(1, dtype=torch.int32)
    views = (View(token, (1, 1), (0, 0, 5, 4), 0), View(token, (1, 1), (0, 0, 2, 10), 1))
    both = VisualLayout((views,), (((4, 10), (10, 2)),))
    assert (both.unseen(0, 0), both.unseen(0, 1)) == (0.5, 0.0)


@pytest.mark.parametrize(("size", "share"), [((640, 384), 0.4), ((384, 640), 0.4), ((90, 90), 0.0), ((84, 252), 2 / 3)])
def test_unseen_of_a_centre_crop(size: tuple[int, int], share: float) -> None:
    result = CarveEngine(*family("llava"), preset=QUICK)(tiny_models.make_image(*size), QUESTION)
    assert result.unseen == pytest.approx(share, rel=1e-12)
    assert CarveEngine(*family("qwen2_vl"), preset=QUICK)(tiny_models.make_image(*size), QUESTION).unseen == 0.0


@settings(max_examples=40)
@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 400), st.integers(1, 400))
@example("clip", 640, 384)
@example("rest of a patch", 1, 400)
def test_the_canvas_is_the_smallest_that_shows_the_whole_image(name: str, width: int, height: int) -> None:
    model, processor = family("llava")
    image_processor = CLIPImageProcessorPil(**{"size": {"shortest_edge": 84}, **CROP, **SHAPES[name]})
    whole = type(processor)(
        image_processor, processor.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    size, top_margin, left_margin = canvas_of(model, whole, (height, width))
    pixels = image_processor(Image.new("RGB", size[::-1]), return_tensors="pt")["pixel_values"]
    count = (pixels.shape[-2] // 14) * (pixels.shape[-1] // 14)
    inputs = {"input_ids": torch.full((1, count), model.config.image_token_id), "pixel_values": pixels}
    left, top, right, bottom = layout_of(model, whole, inputs, [size]).views[0][0].box
    assert left <= left_margin and left_margin + width <= right
    assert top <= top_margin and top_margin + height <= bottom
    # In one direction there is no margin, except for whole pixels.
    visible = min(right, size[1]) - max(left, 0), min(bottom, size[0]) - max(top, 0)
    assert size == (height, width) or min(visible[0] - width, visible[1] - height) <= 4
    # The image is centred in the visible part.
    for first, end, start, length in (
        (max(left, 0), min(right, size[1]), left_margin, width),
        (max(top, 0), min(bottom, size[0]), top_margin, height),
    ):
        assert size == (height, width) or abs((start - first) - (end - start - length)) <= 2


CROP = {"crop_size": {"height": 84, "width": 84}}


def pad_to_square(image: Image.Image, processor: Any) -> tuple[Image.Image, int, int]:
    """LLaVA's own expand2square."""
    side = max(image.size)
    colour = tuple(int(255 * channel) for channel in processor.image_processor.image_mean)
    square = Image.new("RGB", (side, side), colour)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square.paste(image, (left, top))
    return square, left, top


@pytest.mark.parametrize("size", [(200, 120), (90, 161)])
def test_pad_equals_capturing_a_padded_image(size: tuple[int, int]) -> None:
    model, processor = family("llava")
    image = tiny_models.make_image(*size, 5)
    result = CarveEngine(model, processor, preset=QUICK, fit="pad")(image, QUESTION)
    square, left, top = pad_to_square(image, processor)
    captured = {}
    for name, text in (("task", QUESTION), ("general", QUICK.general_prompt)):
        inputs = prepare(processor, [square], build_prompt(processor, text))
        with capture_attention(model, layers=(1, 2), processor=processor) as session:
            output = generate(model, inputs, steps=2)
        captured[name] = session.maps
        maps = getattr(result, name)
        torch.testing.assert_close(maps.values, session.maps.values, rtol=1e-4, atol=1e-6)
        if name == "task":
            new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            assert list(result.answer_ids) == new
    assert result.unseen == 0.0 and result.image.size == size == result.saliency.shape[::-1]
    view = result.task.layout.views[0][0]
    assert result.task.layout.sizes == (((size[1], size[0]),),)
    assert view.box == (-left, -top, max(size) - left, max(size) - top)
    # The saliency of the whole canvas, cropped to the image; regions are in pixels of the image.
    task, general = (captured[name].values[0].mean(2) for name in ("task", "general"))
    canvas = carve(square, task, general, grid=view.grid, preset=QUICK)
    expected = canvas.saliency[top : top + size[1], left : left + size[0]]
    torch.testing.assert_close(result.saliency, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    x0, y0, x1, y1 = result.box
    assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
    assert float(result.mask.float().mean()) <= QUICK.keep + 0.05
    # The second pass pads the refined image as well.
    second = prepare(processor, [pad_to_square(result.refined, processor)[0]], build_prompt(processor, QUESTION))
    last = generate(model, second, steps=2).sequences[0, second["input_ids"].shape[1] :].tolist()
    assert list(result.refined_ids) == last


def test_both_images_of_the_release_preset_are_padded() -> None:
    model, processor = family("llava")
    preset = Preset.release(layers=(1, 2), max_new_tokens=2)
    result = CarveEngine(model, processor, preset=preset, fit="pad")(WIDE, QUESTION)
    assert result.refined.size != result.image.size
    padded = [pad_to_square(image, processor)[0] for image in (result.image, result.refined)]
    inputs = prepare(processor, padded, build_prompt(processor, QUESTION + preset.suffix, 2))
    last = generate(model, inputs, steps=2).sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(result.refined_ids) == last


@pytest.mark.parametrize("fit", [None, "pad"])
@pytest.mark.parametrize("corner", [(8, 8), (170, 90)])
def test_each_token_covers_its_pixels(fit: str | None, corner: tuple[int, int]) -> None:
    """If a spot of the image changes, the token changes whose cell contains the spot."""
    model, processor = family("llava")
    changed = WIDE.copy()
    changed.paste("white", (*corner, corner[0] + 10, corner[1] + 10))
    engine = CarveEngine(model, processor, preset=QUICK, memory=False, fit=fit)
    requests = [engine.request(image, QUESTION) for image in (WIDE, changed)]
    pixels = (request.features.entries["pixel_values"][0] for request in requests)
    before, after = (each.unfold(1, 14, 14).unfold(2, 14, 14) for each in pixels)
    change = (after - before).abs().sum((0, 3, 4))
    view = requests[0].task.layout.views[0][0]
    if fit is None:
        assert float(change.max()) == 0 and requests[0].task.layout.unseen() == pytest.approx(0.4)
        return
    row, column = divmod(int(change.argmax()), view.grid[1])
    left, top, right, bottom = view.box
    x = left + (column + 0.5) * (right - left) / view.grid[1]
    y = top + (row + 0.5) * (bottom - top) / view.grid[0]
    cell = (right - left) / view.grid[1]
    assert abs(x - corner[0] - 5) <= cell and abs(y - corner[1] - 5) <= cell


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_pad_changes_nothing_without_a_crop(name: str) -> None:
    model, processor = family(name)
    image = tiny_models.make_image(120, 120) if name == "llava" else WIDE
    plain, padded = (CarveEngine(model, processor, preset=QUICK, fit=fit)(image, QUESTION) for fit in (None, "pad"))
    assert torch.equal(plain.task.values, padded.task.values) and plain.answer_ids == padded.answer_ids
    assert plain.task.layout.views[0][0].box == padded.task.layout.views[0][0].box and plain.unseen == 0.0


def test_a_processor_that_pads_needs_no_fit() -> None:
    model, processor = tiny_models.tiny_llava()
    processor.image_processor = LlavaImageProcessorPil(size={"shortest_edge": 84}, do_pad=True, **CROP)
    plain, padded = (CarveEngine(model, processor, preset=QUICK, fit=fit)(WIDE, QUESTION) for fit in (None, "pad"))
    assert plain.unseen == 0.0 and plain.task.layout.views[0][0].box == (0, -40, 200, 160)
    assert torch.equal(plain.saliency, padded.saliency) and plain.saliency.shape == (120, 200)


def test_maps_of_different_fits_are_cached_separately() -> None:
    model, processor = family("llava")
    plain, padded = (
        CarveEngine(model, processor, preset=QUICK, fit=fit, memory=False)(WIDE, QUESTION) for fit in (None, "pad")
    )
    first = CarveEngine(model, processor, preset=QUICK)
    first(WIDE, QUESTION)
    second = CarveEngine(model, processor, preset=QUICK, fit="pad", memory=first.memory)
    for engine, expected in ((second, padded), (first, plain), (second, padded)):
        result = engine(WIDE, QUESTION)
        assert result.general.layout.views[0][0].box == expected.general.layout.views[0][0].box
        torch.testing.assert_close(result.general.values, expected.general.values, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.task.values, expected.task.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fit", ["crop", "PAD", True, "", 1])
def test_invalid_fits_are_refused(fit: Any) -> None:
    with pytest.raises(ValueError, match=r"^fit: expected one of None, 'pad'"):
        CarveEngine(*family("llava"), preset=QUICK, fit=fit)


def test_an_impossible_canvas_is_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_models.tiny_llava()

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(model, "forward", run)
    with pytest.raises(ValueError, match=r"^fit: .*max_image_pixels"):
        CarveEngine(model, processor, preset=QUICK, fit="pad", max_image_pixels=200 * 120)(WIDE, QUESTION)
    processor.image_processor = CLIPImageProcessorPil(do_resize=False, **CROP)
    with pytest.raises(ValueError, match=r"^fit: .*do_resize"):
        CarveEngine(model, processor, preset=QUICK, fit="pad")(WIDE, QUESTION)
