"""One question about several images: maps and regions of each, which of them are refined, and what is shown then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, capture_attention, carve
from carve_kernels.hf.engine.result import CarveFailure, CarveResult
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.pipeline import carve_views, strength
from tests.support.families import FAMILIES, family, greedy, state, watched
from tests.support.planted_maps import maps
from tests.support.tiny_models import make_image
from tests.support.tolerances import relative

QUESTION = "what digit is red"
PHOTO, OTHER, THIRD = make_image(240, 160, 1), make_image(100, 180, 2), make_image(131, 77, 3)
REFINED = Preset.paper(layers=(1, 2), max_new_tokens=4)
BOTH = Preset.release(layers=(1, 2), max_new_tokens=4)


def asked(name: str, images: Any, preset: Preset = REFINED, refine: Any = None, **options: Any) -> CarveResult:
    engine = CarveEngine(*family(name), preset=preset, memory=False, **options)
    return engine.ask(images, QUESTION, refine=refine)


def own_maps(result: CarveResult, number: int) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """The maps [L, T, N] of one image's tokens, and its views."""
    views = [view for view in result.layout.views[0] if view.image == number]
    columns = torch.isin(result.task.tokens[0], torch.cat([view.tokens for view in views]))
    return result.task.values[0, :, :, 0][..., columns], result.general.values[0, :, :, 0][..., columns], views


@pytest.mark.parametrize("preset", [REFINED, BOTH])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_generates_and_maps_are_a_sessions(name: str, preset: Preset) -> None:
    model, processor = family(name)
    images = [PHOTO, OTHER, THIRD]
    result = asked(name, images, preset)
    assert list(result.answer_ids) == greedy(name, images, QUESTION + preset.suffix, preset)
    for maps_, text in ((result.task, QUESTION), (result.general, preset.general_prompt)):
        inputs = prepare(processor, images, build_prompt(processor, text + preset.suffix, 3), None, preset.max_pixels)
        layers, steps = (1, 2), preset.max_new_tokens
        with capture_attention(model, processor=processor, layers=layers, max_steps=steps) as session, torch.no_grad():
            model.generate(**inputs, do_sample=False, max_new_tokens=steps)
        assert torch.equal(maps_.tokens, session.maps.tokens)
        assert relative(maps_.values, session.maps.values[:, :, : maps_.values.shape[2]]) < 1e-4
    (chosen,) = result.refined_images
    displayed = [image if number != chosen else result.refined for number, image in enumerate(images)]
    last = displayed if preset.images == "refined" else [*images, result.refined]
    assert list(result.refined_ids) == greedy(name, last, QUESTION + preset.suffix, preset)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_image_has_the_contrast_of_its_own_tokens(name: str) -> None:
    result = asked(name, [PHOTO, OTHER])
    assert len(result.images) == 2 and [each.image.size for each in result.images] == [PHOTO.size, OTHER.size]
    for number, (found, image) in enumerate(zip(result.images, (PHOTO, OTHER), strict=True)):
        task, general, views = own_maps(result, number)
        grids, boxes = [view.grid for view in views], [view.box for view in views]
        alone = carve(image, task, general, grid=grids, box=boxes, preset=REFINED)
        assert torch.equal(found.saliency, alone.saliency) and torch.equal(found.seen, alone.seen)
        assert torch.equal(found.regions.mask, alone.regions.mask) and found.reason == alone.reason
        assert found.refined.tobytes() == alone.refined.tobytes()
        assert found.unseen == result.layout.unseen(0, number)
    strengths = [
        float(numpy.std(each.saliency.numpy()[each.seen.numpy()].astype(numpy.float64))) for each in result.images
    ]
    assert [each.strength for each in result.images] == pytest.approx(strengths, rel=1e-9)
    assert result.refined_images == (int(numpy.argmax(strengths)),)
    chosen = result.images[result.refined_images[0]]
    assert result.image is chosen.image and result.saliency is chosen.saliency and result.regions is chosen.regions
    assert result.refined is chosen.refined and result.unseen == chosen.unseen and result.seen is chosen.seen


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("preset", [REFINED, BOTH])
@pytest.mark.parametrize(("refine", "numbers"), [(0, (0,)), (1, (1,)), ([1, 0], (0, 1)), ("all", (0, 1)), ({1}, (1,))])
def test_named_images_are_refined(name: str, preset: Preset, refine: Any, numbers: tuple[int, ...]) -> None:
    images = [PHOTO, OTHER]
    result = asked(name, images, preset, refine)
    assert result.refined_images == numbers and result.image.size == images[numbers[0]].size
    refined = [result.images[number].refined for number in numbers]
    if preset.images == "refined":
        displayed = [result.images[number].refined if number in numbers else images[number] for number in (0, 1)]
    else:
        displayed = [*images, *refined]
    assert list(result.refined_ids) == greedy(name, displayed, QUESTION + preset.suffix, preset)


def test_the_original_is_read_once_where_the_second_prompt_goes_on_from_it() -> None:
    model, processor = family("qwen2_5_vl")
    lengths: list[int] = []
    decoder = model.get_decoder()
    with watched(decoder, lambda args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1])):
        result = CarveEngine(model, processor, preset=BOTH, memory=False).ask([PHOTO, OTHER], QUESTION, refine="all")
    displayed = [PHOTO, OTHER, *(each.refined for each in result.images)]
    inputs = prepare(processor, displayed, build_prompt(processor, QUESTION + BOTH.suffix, 4), None, BOTH.max_pixels)
    first = int(result.task.tokens.max()) + 1
    assert max(lengths[1:]) <= inputs["input_ids"].shape[1] - first < lengths[0]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_one_image_in_a_list_is_one_image(name: str) -> None:
    engine = CarveEngine(*family(name), preset=REFINED, memory=False)
    alone, listed = engine(PHOTO, QUESTION), engine.ask([PHOTO], QUESTION, refine=0)
    assert alone.refined_ids == listed.refined_ids and torch.equal(alone.saliency, listed.saliency)
    assert alone.refined.tobytes() == listed.refined.tobytes() and alone.refined_images == (0,)
    (only,) = alone.images
    assert only.saliency is alone.saliency and only.refined is alone.refined and only.strength is None
    assert torch.equal(alone.task.values, listed.task.values)


def test_bad_input_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    model, processor = family("llava")
    engine = CarveEngine(model, processor, preset=REFINED)
    before = state(model)
    two = [PHOTO, OTHER]
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ValueError, r"refine: expected None, 'all', or .* from 0 to 1, each once, got int 2", two, {"refine": 2}),
        (ValueError, r"refine: .* from 0 to 1, each once, got int -1", two, {"refine": -1}),
        (ValueError, r"refine: .* each once", two, {"refine": [0, 0]}),
        (ValueError, r"refine: .* each once", two, {"refine": []}),
        (ValueError, r"refine: .* got 'both'", two, {"refine": "both"}),
        (ValueError, r"refine: .* from 0 to 0, each once, got int 1", PHOTO, {"refine": 1}),
        (TypeError, r"refine: .* got bool True", two, {"refine": True}),
        (TypeError, r"refine: .* got float 1\.0", two, {"refine": 1.0}),
        (ValueError, r"images: expected at least one image", [], {}),
        (ValueError, r"images\[1\]: .*none.png is missing", [PHOTO, tmp_path / "none.png"], {}),
        (TypeError, r"images\[1\]: expected a path or a PIL image, got list", [PHOTO, [OTHER]], {}),
        (ValueError, r"prompt: expected '<image>' for each of 2 image\(s\), got 1", two, {"prompt": "<image> which"}),
        (ValueError, r"prompt: expected '<image>' for each of 2 image\(s\), got 3", two, {"prompt": "<image>" * 3}),
    ]  # fmt: skip

    def ran(*_: Any) -> None:
        raise RuntimeError("the model ran")

    hook = model.register_forward_pre_hook(ran)
    try:
        for error, message, images, options in cases:
            with pytest.raises(error, match=message):
                engine.ask(images, QUESTION, **options)
        with pytest.raises(ValueError, match="question: expected a string with"):
            engine.ask(two, " ")
    finally:
        hook.remove()
    assert state(model) == before


def test_a_prompt_may_have_text_between_its_images() -> None:
    model, processor = family("llava")
    prompt = "first <image> and then <image> which is red"
    result = CarveEngine(model, processor, preset=REFINED).ask([PHOTO, OTHER], QUESTION, prompt=prompt, refine=1)
    for images, found in (([PHOTO, OTHER], result.answer_ids), ([PHOTO, result.refined], result.refined_ids)):
        inputs = prepare(processor, images, prompt, None, REFINED.max_pixels)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        assert list(found) == ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_an_item_of_a_batch_may_be_several_images() -> None:
    engine = CarveEngine(*family("qwen2_5_vl"), preset=REFINED)
    batch = engine([[PHOTO, OTHER], PHOTO, (OTHER, PHOTO), [PHOTO, "/none.png"]], QUESTION)
    first, second, third, failed = batch
    assert isinstance(failed, CarveFailure) and "images[1]: /none.png is missing" in str(failed.error)
    assert failed.image == [PHOTO, "/none.png"]
    fresh = CarveEngine(*family("qwen2_5_vl"), preset=REFINED, memory=False)
    for found, images in ((first, [PHOTO, OTHER]), (second, PHOTO), (third, [OTHER, PHOTO])):
        alone = fresh.ask(images, QUESTION)
        assert isinstance(found, CarveResult) and found.answer_ids == alone.answer_ids
        assert found.refined_ids == alone.refined_ids and found.refined_images == alone.refined_images
        assert relative(found.task.values, alone.task.values) < 1e-5


def test_a_memory_knows_the_images_and_their_order() -> None:
    engine = CarveEngine(*family("qwen2_5_vl"), preset=REFINED)
    fresh = CarveEngine(*family("qwen2_5_vl"), preset=REFINED, memory=False)
    for images in ([PHOTO, OTHER], [PHOTO, OTHER], [OTHER, PHOTO], [PHOTO], [OTHER, OTHER]):
        found, alone = engine.ask(images, QUESTION), fresh.ask(images, QUESTION)
        assert found.refined_ids == alone.refined_ids
        assert relative(found.general.values, alone.general.values) < 1e-5
    assert engine.memory is not None and engine.memory.held().maps == 4


def test_padded_images_are_seen_whole() -> None:
    result = asked("llava", [PHOTO, OTHER], fit="pad")
    assert [each.unseen for each in result.images] == [0.0, 0.0] and all(
        bool(each.seen.all()) for each in result.images
    )
    cropped = asked("llava", [PHOTO, OTHER])
    assert [round(each.unseen, 3) for each in cropped.images] == [round(1 / 3, 3), round(4 / 9, 3)]
    assert [float((~each.seen).float().mean()) for each in cropped.images] == pytest.approx([1 / 3, 4 / 9], abs=0.01)


def field(rows: int, columns: int, height: float, spot: float) -> torch.Tensor:
    """A map [1, 1, N] of a bright square at the centre of a grid, per token."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    inside = ((y - 0.5).abs() < spot / 2) & ((x - 0.5).abs() < spot / 2)
    return (1 + height * inside.float()).reshape(1, 1, -1) / (rows * columns)


def test_the_strength_does_not_grow_with_the_tokens_of_an_image() -> None:
    def measured(rows: int, columns: int, height: float, **options: Any) -> float:
        task, general = field(rows, columns, height, 0.25), field(rows, columns, 0.0, 0.25)
        size, preset = (16 * rows, 16 * columns), Preset.paper(**options)
        return strength(size, task, general, [(rows, columns)], [(0, 0, size[1], size[0])], preset, "reference")

    for options in ({}, {"normalize": "sum"}, {"normalize": "minmax"}, {"lam": 1e-8}):
        small, large = measured(8, 8, 3.0, **options), measured(32, 32, 3.0, **options)
        assert small == pytest.approx(large, rel=0.25)
        assert measured(8, 8, 6.0, **options) == pytest.approx(2 * small, rel=1e-5) and 2 * small > 1.5 * large
        assert measured(8, 8, 0.0, **options) == 0.0


def test_an_image_without_regions_is_not_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    task, general = maps((1, 36), layers=2, steps=1)
    flat = torch.ones_like(general)
    assert strength((60, 60), flat, 2 * flat, [(6, 6)], [(0, 0, 60, 60)], REFINED, "reference") == 0.0
    assert strength((60, 60), task, general, [(6, 6)], [(0, 0, 60, 60)], REFINED, "reference") > 0.0
    images = [PHOTO, OTHER]
    strongest = asked("llava", images).refined_images[0]

    def unseen(image: Image.Image, *arguments: Any) -> Any:
        outcome = carve_views(image, *arguments)
        if image.size != images[strongest].size:
            return outcome
        return replace(outcome, reason="planted", refined=image)

    monkeypatch.setattr("carve_kernels.hf.engine.passes.carve_views", unseen)
    result = asked("llava", images)
    assert result.refined_images == (1 - strongest,) and result.reason is None
    named = asked("llava", images, refine=strongest)
    assert named.reason == f"image {strongest}: planted" and named.refined_ids == named.answer_ids
    both = asked("llava", images, refine="all")
    assert both.reason is None and both.refined_images == (0, 1)
