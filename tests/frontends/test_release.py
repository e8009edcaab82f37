"""The release's names against a rendition of its procedure: eager attention, no cache, NumPy, SciPy, Pillow."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from carve_kernels.frontends import release
from carve_kernels.models.scenes import draw_scene
from tests.support.processors.kinds import pair
from tests.support.zoo.kinds import IMAGE, build

LAYERS, STEPS, QUESTION = [1, 2, 3], 6, "what digit is red"
SUFFIX = "Answer the question using a single word or phrase."
# LLaVA's processor shows the middle of an image that is not square, and the release would stretch it over all of it.
SIZES = {
    "qwen2_5": [(150, 90), (97, 131), (112, 112)],
    "llava": [(120, 120), (91, 91), (56, 56)],
    "qwen2_vl": [(130, 100)],
}
KINDS = {"qwen2_5": "qwen2_5_vl", "llava": "llava", "qwen2_vl": "qwen2_vl"}


class Rendition(NamedTuple):
    """What the release's procedure finds."""

    answer: str
    refined_answer: str
    saliency: Any
    mask: Any
    box: tuple[int, ...]
    refined: Image.Image
    task: list[Any]
    general: list[Any]


@functools.cache
def models(family: str) -> tuple[Any, Any, Any]:
    """A model, the same one with eager attention, and its processor."""
    model, processor = pair(KINDS[family])
    eager = build(KINDS[family])[0]
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    return model, eager, processor


@functools.cache
def images(family: str) -> list[Image.Image]:
    return [draw_scene(seed=seed, level=4, split="test").image.convert("RGB").resize(size)
            for seed, size in enumerate(SIZES[family])]  # fmt: skip


def model_inputs(processor: Any, family: str, displayed: list[Image.Image], text: str) -> Any:
    if family == "llava":
        prompt = "<image>" * len(displayed) + f"\nUSER: {text} {SUFFIX}\nASSISTANT:"
    else:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        bounds = {"factor": 28, "min_pixels": 4 * 28 * 28, "max_pixels": 16384 * 28 * 28}
        sizes = [smart_resize(image.height, image.width, **bounds) for image in displayed]
        displayed = [image.resize((width, height)) for image, (height, width) in zip(displayed, sizes, strict=True)]
        content = [*({"type": "image"} for _ in displayed), {"type": "text", "text": f"{text} {SUFFIX}"}]
        message = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return processor(images=displayed, text=[prompt], return_tensors="pt")


def greedy(model: Any, processor: Any, inputs: Any) -> tuple[str, list[list[Any]]]:
    """Every token by a forward over the whole prompt, and the last row of every layer."""
    ids = inputs["input_ids"]
    columns = (ids[0] == IMAGE).nonzero().flatten()
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    maps, new = [], []
    for _ in range(STEPS):
        if "mm_token_type_ids" in rest:
            rest["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(new)))
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True, **rest)
        maps.append([layer[0, :, -1, columns].mean(0).numpy() for layer in out.attentions])
        token = int(out.logits[0, -1].argmax())
        if token == processor.tokenizer.eos_token_id:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip(), maps


def saliency_of(task: Any, general: Any, grid: Any, size: Any, layers: Any, steps: Any, lam: float = 1e-8) -> Any:
    total = np.zeros((size[1], size[0]))
    for step in steps:
        for layer in layers:
            ratio = (task[step][layer] / (general[step][layer] + lam)).reshape(grid).astype(np.float32)
            total += (step + 1) * np.asarray(Image.fromarray(ratio).resize(size, Image.Resampling.BILINEAR))
    return total


def mask_of(saliency: Any, rule: str, share: float = 0.2, floor: int = 3, percent: float = 0.1) -> Any:
    above = saliency >= np.percentile(saliency, (1 - share) * 100)
    labels, count = ndimage.label(above)
    numbers = np.arange(1, count + 1)
    sizes = ndimage.sum(above, labels, numbers)
    if rule == "remove_small":
        return np.isin(labels, numbers[sizes >= int(above.sum() * percent / 100)]).astype(np.uint8)
    scores = sizes if rule == "size" else ndimage.sum(saliency, labels, numbers)
    best = np.argsort(-scores, kind="stable")[: max(floor, int(count * share))]
    return np.isin(labels, numbers[best]).astype(np.uint8)


@functools.cache
def passes(family: str, number: int) -> Any:
    """Answers and maps of both prompts, and the grid."""
    _, eager, processor = models(family)
    image = images(family)[number]
    task = model_inputs(processor, family, [image], QUESTION)
    general = model_inputs(processor, family, [image], "Write a general description of the image.")
    grid = (4, 4) if family == "llava" else tuple(int(side) // 2 for side in task["image_grid_thw"][0, 1:])
    return greedy(eager, processor, task), greedy(eager, processor, general), grid


def rendition(family: str, number: int, version: str) -> Rendition:
    _, eager, processor = models(family)
    image = images(family)[number]
    (answer, task), (_, general), grid = passes(family, number)
    every = range(min(len(task), len(general)))
    steps = {"v4": every}.get(version, range(1))
    rule = {"v1": "remove_small", "v2": "size"}.get(version, "attention_sum")
    saliency = saliency_of(task, general, grid, image.size, LAYERS, steps)
    mask = mask_of(saliency, rule)
    rows, columns = np.nonzero(mask)
    box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
    crop = Image.fromarray(np.asarray(image) * mask[..., None]).crop(box)
    scale = max(image.width / crop.width, image.height / crop.height)
    refined = crop.resize((int(crop.width * scale), int(crop.height * scale)), Image.Resampling.LANCZOS)
    inputs = model_inputs(processor, family, [image, refined], QUESTION)
    with torch.no_grad():
        ids = eager.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    last = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    return Rendition(answer, last, saliency, mask, box, refined, task, general)


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("family", ["qwen2_5", "llava"])
def test_carve_equals_the_procedure(family: str, number: int, version: str) -> None:
    model, _, processor = models(family)
    expected = rendition(family, number, version)
    found = release.carve(
        model, processor, images(family)[number], QUESTION,
        family=family, version=version, layers=LAYERS, max_new_tokens=STEPS,
    )  # fmt: skip
    assert np.abs(found.sum_att_map - expected.saliency).max() <= 1e-5 * expected.saliency.max()
    assert np.ptp(expected.saliency) > 1e-2 * expected.saliency.max()
    assert 0 < expected.mask.sum() < expected.mask.size
    np.testing.assert_array_equal(found.mask_map, expected.mask)
    assert found.bbox == expected.box
    np.testing.assert_array_equal(np.asarray(found.refined_image), np.asarray(expected.refined))
    assert (found.original_answer, found.refined_answer) == (expected.answer, expected.refined_answer)
    np.testing.assert_allclose(found.query_attention, expected.task, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(found.general_attention, expected.general, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["qwen2_5", "llava"])
def test_one_prompt_after_the_other_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a model that rules out tree decoding."""
    model, _, processor = models(family)
    expected = rendition(family, 0, "v4")
    monkeypatch.setattr("carve_kernels.hf.decoding.sequential_reason", lambda model: "the test says so")
    found = release.carve(
        model, processor, images(family)[0], QUESTION, family=family, layers=LAYERS, max_new_tokens=STEPS
    )
    assert np.abs(found.sum_att_map - expected.saliency).max() <= 1e-5 * expected.saliency.max()
    np.testing.assert_array_equal(found.mask_map, expected.mask)
    assert (found.original_answer, found.refined_answer) == (expected.answer, expected.refined_answer)


def test_carve_takes_qwen2_vl_too() -> None:
    model, _, processor = models("qwen2_vl")
    expected = rendition("qwen2_vl", 0, "v4")
    found = release.carve(model, processor, images("qwen2_vl")[0], QUESTION, layers=LAYERS, max_new_tokens=STEPS)
    np.testing.assert_array_equal(found.mask_map, expected.mask)
    assert (found.original_answer, found.refined_answer) == (expected.answer, expected.refined_answer)


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.7}, {"num_beams": 8}])
def test_the_generation_config_decides_over_the_last_answer_only(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eager, processor = models("qwen2_5")
    usual = rendition("qwen2_5", 1, "v4")
    for each in (model, eager):
        for name, value in option.items():
            monkeypatch.setattr(each.generation_config, name, value)
    expected = rendition("qwen2_5", 1, "v4")
    assert expected.refined_answer != usual.refined_answer
    found = release.carve(model, processor, images("qwen2_5")[1], QUESTION, layers=LAYERS, max_new_tokens=STEPS)
    assert (found.original_answer, found.refined_answer) == (usual.answer, expected.refined_answer)


def test_names_and_defaults_are_the_release_s() -> None:
    defaults = {
        "carve": {
            "family": "qwen2_5", "version": "v4", "layers": list(range(20, 26)), "lam": 1e-8, "top_percent": 0.2,
            "min_keep_regions": 3, "outlier_percent": 0.1, "max_new_tokens": 32,
            "general_instruction": "Write a general description of the image.", "device": None, "save_dir": None,
        },
        "load_model": {"family": "qwen2_5", "device": "cuda"},
        "generate_with_attention": {
            "max_new_tokens": 32, "vision_start_token_id": None, "vision_end_token_id": None, "num_image_tokens": 576,
        },
        "fuse_contrastive_attention": {
            "layers": list(range(20, 26)), "lam": 1e-8, "output_shape": None, "step_mode": "all",
        },
        "dynamic_reshape_attention": {"fallback_shape": None},
        "create_attention_mask": {
            "top_percent": 0.2, "min_keep_regions": 3, "outlier_percent": 0.1, "strategy": "attention_sum",
        },
        "att_sum_crop_pipeline": {
            "top_percent": 0.2, "min_keep_regions": 3, "outlier_percent": 0.1, "strategy": "attention_sum",
            "save_dir": None,
        },
        "plot_pipeline": {"save_path": None},
        "plot_layerwise": {"lam": 1e-8, "step": 0, "save_path": None},
    }  # fmt: skip
    for name, expected in defaults.items():
        parameters = inspect.signature(getattr(release, name)).parameters.values()
        assert {each.name: each.default for each in parameters if each.default is not each.empty} == expected
    assert list(range(20, 26)) == release.DEFAULT_LAYERS
    assert release.VERSIONS == {
        "v1": ("first", "remove_small"),
        "v2": ("first", "size"),
        "v3": ("first", "attention_sum"),
        "v4": ("all", "attention_sum"),
    }


@pytest.mark.parametrize("rule", ["remove_small", "size", "attention_sum"])
@pytest.mark.parametrize("size", [(5, 5), (12, 9), (40, 64)])
def test_masks_equal_scipy_s(rule: str, size: tuple[int, int]) -> None:
    """Values with many ties, so that sizes and sums are equal often, and smooth ones."""
    random = np.random.default_rng(0)
    for case in range(40):
        values = random.integers(0, 6, size).astype(np.float64) if case % 2 else random.random(size)
        share, floor = float(random.choice([0.05, 0.2, 0.5, 1.0])), int(random.integers(1, 5))
        percent = float(random.choice([0.1, 2.0, 10.0, 60.0]))
        found = release.create_attention_mask(
            values, top_percent=share, min_keep_regions=floor, outlier_percent=percent, strategy=rule
        )
        expected = mask_of(values, rule, share, floor, percent)
        np.testing.assert_array_equal(found, expected, err_msg=f"case {case}: {share} {floor} {percent}")
        assert found.dtype == np.uint8


def test_nothing_is_left_where_every_region_is_small() -> None:
    checkers = np.indices((8, 8)).sum(0) % 2.0
    found = release.create_attention_mask(checkers, top_percent=0.3, outlier_percent=50.0, strategy="remove_small")
    assert not found.any() and release.get_crop_bbox_from_mask(found) == (0, 0, 8, 8)


@pytest.mark.parametrize(("mode", "steps"), [("first", range(1)), ("all", range(2))])
def test_fusing_equals_a_resize_of_each_ratio(mode: str, steps: range) -> None:
    random = np.random.default_rng(0)
    task, general = (list(random.random((count, 5, 24)).astype(np.float32)) for count in (3, 2))
    found = release.fuse_contrastive_attention(
        task, general, (50, 31), layers=[1, -1, 3, 3, 9], lam=0.1, output_shape=np.array([4, 6]), step_mode=mode
    )
    expected = saliency_of(task, general, (4, 6), (50, 31), [1, 4, 3, 3], steps, 0.1)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert found.dtype == np.float64


def test_the_true_grid_is_used_where_the_release_takes_a_square() -> None:
    ratio = np.arange(256, dtype=np.float32)
    grid, shape = release.dynamic_reshape_attention(ratio, (8, 32))
    assert shape == (8, 32) and grid[1, 0] == 32
    assert release.dynamic_reshape_attention(ratio)[1] == (16, 16)
    assert release.dynamic_reshape_attention(ratio[:24]) == (None, None)
    for count in (255, 257):
        with pytest.raises(ValueError, match=f"fallback_shape: expected the grid of {count} tokens, got 8 x 32"):
            release.dynamic_reshape_attention(np.ones(count), (8, 32))


def test_llava_s_saliency_is_where_its_processor_has_cropped() -> None:
    model, _, processor = models("llava")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 112, 3), dtype=np.uint8))
    found = release.carve(model, processor, image, QUESTION, family="llava", layers=LAYERS, max_new_tokens=2)
    assert not found.sum_att_map[:, :28].any() and not found.sum_att_map[:, 84:].any()
    middle = release.carve(
        model, processor, image.crop((28, 0, 84, 56)), QUESTION, family="llava", layers=LAYERS, max_new_tokens=2
    )
    np.testing.assert_allclose(found.sum_att_map[:, 28:84], middle.sum_att_map, rtol=1e-4)


def test_one_prompt_ends_at_the_tokenizer_s_end_token() -> None:
    """The generation config is not asked, as in the release."""
    model, eager, processor = models("qwen2_5")
    inputs = model_inputs(processor, "qwen2_5", images("qwen2_5")[:1], QUESTION)
    start, stop = (processor.tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end"))
    marks = {"vision_start_token_id": start, "vision_end_token_id": stop, "max_new_tokens": STEPS}
    whole = release.generate_with_attention(model, processor, inputs, **marks)
    assert whole["generated_text"] == greedy(eager, processor, inputs)[0]
    ids = inputs["input_ids"][0].tolist()
    columns = ids.index(start) + 1, ids.index(stop)
    assert whole["vision_token_positions"] == columns and len(whole["all_attention_maps"]) == STEPS
    with torch.no_grad():
        first = int(model(**inputs).logits[0, -1].argmax())
    ending = copy.deepcopy(processor)
    ending.tokenizer.eos_token = ending.tokenizer.convert_ids_to_tokens(first)
    assert ending.tokenizer.eos_token_id == first
    found = release.generate_with_attention(model, ending, inputs, max_new_tokens=STEPS)
    assert found["generated_text"] == "" and len(found["all_attention_maps"]) == 1
    assert found["vision_token_positions"] == columns
    np.testing.assert_allclose(found["all_attention_maps"][0], whole["all_attention_maps"][0], rtol=1e-6)


def test_llava_s_columns_are_the_run_of_its_token() -> None:
    model, _, processor = models("llava")
    inputs = model_inputs(processor, "llava", images("llava")[:1], QUESTION)
    for most, count in ((576, 16), (5, 5)):
        found = release.generate_with_attention(
            model, processor, inputs, max_new_tokens=1, vision_start_token_id=IMAGE, num_image_tokens=most
        )
        assert found["vision_token_positions"] == (1, 1 + count)
        assert [len(each) for each in found["all_attention_maps"][0]] == [count] * 4


def test_files_and_figures(tmp_path: Path) -> None:
    model, _, processor = models("qwen2_5")
    image, folder = images("qwen2_5")[0], tmp_path / "saved"
    found = release.carve(
        model, processor, image, QUESTION, layers=LAYERS, max_new_tokens=2, save_dir=str(folder), version="v3"
    )
    names = ["crop_masked_image", "marked_original", "mask_map", "masked_image", "sum_att_map"]
    assert sorted(path.stem for path in folder.iterdir()) == names
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "mask_map.png")), found.mask_map * 255)
    heat = np.asarray(Image.open(folder / "sum_att_map.png"))
    assert heat.shape == found.sum_att_map.shape and (heat.min(), heat.max()) == (0, 254)
    pytest.importorskip("matplotlib").use("Agg")
    release.plot_pipeline(image, found, save_path=str(tmp_path / "pipeline.png"))
    figure = release.plot_layerwise(found, save_path=str(tmp_path / "layerwise.png"))
    assert [axis.get_title() for axis in figure.axes] == [f"Layer {layer}" for layer in range(4)]
    np.testing.assert_allclose(
        figure.axes[2].images[0].get_array().ravel(),
        found.query_attention[0][2] / (found.general_attention[0][2] + 1e-8),
    )
    assert all(Image.open(tmp_path / f"{name}.png").width > 100 for name in ("pipeline", "layerwise"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v5"}, "version: expected one of 'v1'"),
        ({"family": "llava"}, "family: expected the one of the model, whose model_type is 'qwen2_5_vl'"),
        ({"layers": range(20, 26)}, "layers: expected numbers below 4"),
        ({"device": "cuda"}, "device: expected that of the model, cpu"),
        ({"top_percent": 0}, "top_percent: expected a share above 0"),
        ({"min_keep_regions": 0}, "min_keep_regions: expected an integer"),
        ({"outlier_percent": -1}, "outlier_percent: expected a number"),
        ({"lam": -1}, "lam: expected a number"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer"),
        ({"general_instruction": " "}, "general_instruction: expected a string"),
    ],
)
def test_arguments_are_refused_before_the_model_runs(options: dict[str, Any], message: str) -> None:
    model, _, processor = models("qwen2_5")

    def fail(*_: Any) -> None:
        raise AssertionError("the model was run")

    hook = model.get_input_embeddings().register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match=message):
            release.carve(model, processor, images("qwen2_5")[0], QUESTION, **{"layers": LAYERS, **options})
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"query_maps": []}, "query_maps, general_maps: expected at least one step"),
        (ValueError, {"query_maps": [[np.ones(24)]]}, "query_maps, general_maps: expected as many layers at each"),
        (ValueError, {"query_maps": [[np.full(24, np.nan)] * 2]}, "query_maps: expected finite maps"),
        (ValueError, {"general_maps": [[np.ones(20)] * 2]}, "general_maps: expected 24 tokens as in query_maps"),
        (ValueError, {"layers": [2, 3]}, "layers: expected numbers below 2"),
        (TypeError, {"layers": ["all"]}, r"layers\[0\]: expected an integer"),
        (ValueError, {"output_shape": (5, 5)}, "output_shape: expected the grid of 24 tokens, got 5 x 5"),
        (ValueError, {"output_shape": None}, "output_shape: expected the grid of the 24 tokens"),
        (ValueError, {"step_mode": "last"}, "step_mode: expected one of 'first', 'all'"),
    ],
)
def test_maps_that_do_not_fit_are_refused(error: type[Exception], change: dict[str, Any], message: str) -> None:
    maps = [[np.ones(24)] * 2]
    given = {"query_maps": maps, "general_maps": maps, "layers": [0], "output_shape": (4, 6), **change}
    with pytest.raises(error, match=message):
        release.fuse_contrastive_attention(image_size=(30, 20), **given)


def test_a_checkpoint_is_loaded_as_the_release_loads_it(tmp_path: Path) -> None:
    model, _, processor = models("qwen2_5")
    for each in (model, processor):
        each.save_pretrained(tmp_path)
    loaded, found = release.load_model(str(tmp_path), device="cpu")
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    wide = Image.new("RGB", (2000, 1500))
    _, rows, columns = found.image_processor(images=[wide])["image_grid_thw"][0]
    assert 200 * 28 * 28 < rows * columns * 14 * 14 <= 256 * 28 * 28
    with pytest.raises(ValueError, match="family: expected the one of the model"):
        release.load_model(str(tmp_path), family="llava", device="cpu")


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_a_reversed_map_of_one_line_has_the_mask_of_its_copy(shape: tuple[int, int]) -> None:
    line = np.random.default_rng(0).random(shape)[::-1, ::-1]
    found = release.create_attention_mask(line, top_percent=0.3)
    assert np.array_equal(found, release.create_attention_mask(line.copy(), top_percent=0.3))
