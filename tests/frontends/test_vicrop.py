"""ViCrop's names against a rendition of its procedure: eager attention, one prompt at a time, plain NumPy."""

from __future__ import annotations

import copy
import functools
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carve_kernels.frontends import vicrop
from carve_kernels.models.scenes import draw_scene
from tests.support.processors.kinds import CROP, image_processor, pair
from tests.support.zoo.kinds import IMAGE, build

KINDS = {"llava": "llava", "qwen2_5": "qwen2_5_vl"}
MAPS = {"llava": vicrop.rel_attention_llava, "qwen2_5": vicrop.rel_attention_qwen2_5}
GRADIENTS = {"llava": vicrop.gradient_attention_llava, "qwen2_5": vicrop.gradient_attention_qwen2_5}
SIZES = {"llava": [(120, 120), (91, 91)], "qwen2_5": [(150, 90), (97, 131)]}
QUESTION, GENERAL = "what digit is red", "Write a general description of the image."
SUFFIX = "Answer the question using a single word or phrase."


@functools.cache
def models(name: str) -> tuple[Any, Any, Any]:
    """A model, the same one with eager attention, and its processor."""
    model, processor = pair(KINDS[name])
    eager = build(KINDS[name])[0]
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    return model, eager, processor


def scene(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return draw_scene(seed=seed, level=4, split="test").image.convert("RGB").resize(size)


def asked(name: str, text: str) -> str:
    """What is passed as a prompt."""
    return f"<image>\nUSER: {text} {SUFFIX}\nASSISTANT:" if name == "llava" else f"{text} {SUFFIX}"


def model_inputs(name: str, images: list[Image.Image], text: str) -> Any:
    processor = models(name)[2]
    if name == "llava":
        prompt = "<image>" * (len(images) - 1) + text
    else:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return processor(images=images, text=[prompt], return_tensors="pt")


def last_row(name: str, image: Image.Image, text: str, layer: int) -> Any:
    """The last row of a layer of eager attention on the grid of the image, averaged over the heads."""
    inputs = model_inputs(name, [image], text)
    with torch.no_grad():
        out = models(name)[1](**inputs, output_attentions=True)
    columns = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    grid = (4, 4) if name == "llava" else [int(side) // 2 for side in inputs["image_grid_thw"][0, 1:]]
    return out.attentions[layer][0, :, -1, columns].mean(0).numpy().reshape(grid)


def relative(name: str, image: Image.Image, layer: int) -> Any:
    task, general = (last_row(name, image, asked(name, text), layer) for text in (QUESTION, GENERAL))
    return task / general


def weighted(name: str, image: Image.Image, layer: int) -> Any:
    """Eager attention of the last row times the positive part of its gradient by autograd, averaged over the heads."""
    inputs = model_inputs(name, [image], asked(name, QUESTION))
    out = models(name)[1](**inputs, output_attentions=True)
    attention = out.attentions[layer]
    [gradient] = torch.autograd.grad(out.logits[0, -1].softmax(-1).max().log(), attention)
    columns = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    grid = (4, 4) if name == "llava" else [int(side) // 2 for side in inputs["image_grid_thw"][0, 1:]]
    products = (attention * gradient.clamp(min=0))[0, :, -1, columns]
    return products.mean(0).detach().numpy().reshape(grid)


def answer(name: str, images: list[Image.Image]) -> str:
    inputs = model_inputs(name, images, asked(name, QUESTION))
    _, eager, processor = models(name)
    ids = eager.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", list(KINDS))
def test_relative_attention_equals_eager_s(name: str, number: int, layer: int) -> None:
    model, _, processor = models(name)
    image = scene(SIZES[name][number], number)
    found = MAPS[name](image, asked(name, QUESTION), asked(name, GENERAL), model, processor, layer=layer)
    expected = relative(name, image, layer)
    assert found.dtype == np.float32 and np.ptp(expected) > 1e-2 * expected.max()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    box = vicrop.bbox_from_att_image_adaptive(found, image.size, 40)
    assert box == vicrop.bbox_from_att_image_adaptive(expected, image.size, 40) != (0, 0, *image.size)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", list(KINDS))
def test_gradient_attention_equals_eager_autograd(name: str, number: int, layer: int) -> None:
    model, _, processor = models(name)
    image = scene(SIZES[name][number], number)
    given = image, asked(name, QUESTION), asked(name, GENERAL), model, processor
    found, expected = GRADIENTS[name](*given, layer=layer), weighted(name, image, layer)
    assert found.dtype == np.float32 and np.ptp(expected) > 0.1 * expected.max()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    with torch.inference_mode():
        np.testing.assert_array_equal(GRADIENTS[name](*given, layer=layer), found)


def test_gradient_attention_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, processor = models("llava")
    attention = model.model.language_model.layers[2].self_attn
    before = set(vars(attention))
    given = scene((91, 91)), asked("llava", QUESTION), asked("llava", GENERAL), model, processor
    vicrop.gradient_attention_llava(*given, layer=2)
    assert torch.is_grad_enabled() and set(vars(attention)) == before
    assert all(weight.grad is None for weight in model.parameters())

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    hook = model.model.language_model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        vicrop.gradient_attention_llava(*given, layer=2)
    hook.remove()
    assert torch.is_grad_enabled() and set(vars(attention)) == before


def test_a_graph_of_gradient_attention_begins_at_its_layer() -> None:
    """What the layers before would keep is not needed."""
    model, _, processor = models("llava")
    kept = {}
    hooks = [
        layer.register_forward_hook(
            lambda module, given, output, number=number: kept.update(
                {number: (output if isinstance(output, torch.Tensor) else output[0]).requires_grad}
            )
        )
        for number, layer in enumerate(model.model.language_model.layers)
    ]
    vicrop.gradient_attention_llava(
        scene((91, 91)), asked("llava", QUESTION), asked("llava", GENERAL), model, processor, layer=2
    )
    for hook in hooks:
        hook.remove()
    assert kept == {0: False, 1: False, 2: True, 3: True}


def test_prompts_whose_texts_before_the_image_differ() -> None:
    model, _, processor = models("llava")
    image, prompts = scene((91, 91)), ["what is red? <image>\nASSISTANT:", "USER: describe the image <image> now"]
    found = vicrop.rel_attention_llava(image, prompts[0], prompts[1], model, processor, layer=2)
    task, general = (last_row("llava", image, prompt, 2) for prompt in prompts)
    np.testing.assert_allclose(found, task / general, rtol=1e-4)


@pytest.mark.parametrize(("size", "before"), [((112, 56), (0, 2)), ((56, 112), (2, 0)), ((100, 56), (0, 2))])
def test_the_map_of_a_cropped_image_is_one_of_the_whole_image(size: tuple[int, int], before: tuple[int, int]) -> None:
    """LLaVA's processor shows the middle, which is 4 x 4 tokens of 14 pixels."""
    model, _, processor = models("llava")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    found = vicrop.rel_attention_llava(
        image, asked("llava", QUESTION), asked("llava", GENERAL), model, processor, layer=2
    )
    expected = np.pad(relative("llava", image, 2), [(side, side) for side in before])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # A box of two tokens is inside of what the model saw, which a map stretched over the image would not ensure.
    box = vicrop.bbox_from_att_image_adaptive(found, image.size, 29)
    visible = Image.new("L", image.size)
    left, top = (size[0] - 56) // 2, (size[1] - 56) // 2
    visible.paste(1, (left, top, left + 56, top + 56))
    assert np.asarray(visible.crop(box)).mean() > 0.8


@pytest.mark.parametrize(("size", "inside"), [((112, 56), np.s_[1:3]), ((56, 112), np.s_[:, 1:3])])
def test_tokens_of_the_padding_are_left_out(size: tuple[int, int], inside: Any) -> None:
    """A processor that pads to a square before it resizes: half of the 4 x 4 tokens are outside of the image."""
    model, eager, processor = models("llava")
    padding = copy.deepcopy(processor)
    padding.image_processor = image_processor("llava", "LlavaImageProcessor")(do_pad=True, **CROP)
    image, prompts = scene(size), (asked("llava", QUESTION), asked("llava", GENERAL))
    found = vicrop.rel_attention_llava(image, *prompts, model, padding, layer=2)
    maps = []
    for prompt in prompts:
        inputs = padding(images=[image], text=[prompt], return_tensors="pt")
        with torch.no_grad():
            row = eager(**inputs, output_attentions=True).attentions[2][0, :, -1].mean(0)
        maps.append(row[inputs["input_ids"][0] == IMAGE].numpy().reshape(4, 4))
    np.testing.assert_allclose(found, (maps[0] / maps[1])[inside], rtol=1e-4)


def test_each_image_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both answers and both maps share what the vision tower returns for the image, and its cached prefix."""
    model, _, processor = models("llava")
    monkeypatch.setitem(vicrop.FAMILIES, "llava", vicrop.FAMILIES["llava"]._replace(bbox_size=36))
    scene(SIZES["llava"][0]).save(tmp_path / "image.png")
    honest, read = vicrop.names.image_features, []

    def counted(model: Any, entries: Any) -> Any:
        read.append(len(entries["pixel_values"]))
        return honest(model, entries)

    monkeypatch.setattr(vicrop.names, "image_features", counted)
    given = "llava", "rel_att", tmp_path / "image.png", QUESTION, model, processor, "what is blue"
    vicrop.vicrop_qa(*given, layer=2)
    assert read == [1, 1]


@pytest.mark.parametrize("method", ["rel_att", "grad_att"])
def test_answers_with_beams_are_those_of_generate(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager, processor = models("llava")
    monkeypatch.setitem(vicrop.FAMILIES, "llava", vicrop.FAMILIES["llava"]._replace(bbox_size=36))
    for each in (model, eager):
        monkeypatch.setattr(each.generation_config, "num_beams", 3)
    image = scene(SIZES["llava"][0])
    image.save(tmp_path / "image.png")
    given = "llava", method, tmp_path / "image.png", QUESTION, model, processor, QUESTION
    found = vicrop.vicrop_qa(*given, layer=2)
    values = (relative if method == "rel_att" else weighted)("llava", image, 2)
    box = box_of(values, image.size, 36)
    assert found == (answer("llava", [image]), answer("llava", [image, image.crop(box)]), box)


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("method", vicrop.METHODS)
def test_the_answer_about_both_images(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, processor = models(name)
    monkeypatch.setitem(vicrop.FAMILIES, name, vicrop.FAMILIES[name]._replace(bbox_size=36))
    image = scene(SIZES[name][0])
    image.save(tmp_path / "image.png")
    of_method = weighted if method.startswith("grad_att") else relative
    if method.endswith("_high"):
        monkeypatch.setattr(vicrop.high_res_split_threshold, "__defaults__", (80,))
        parts, rows, columns = vicrop.high_res_split_threshold(image, 80)
        assert rows > 1
        maps = [of_method(name, part, 2) for part in parts]
        values = np.block([maps[row * columns : (row + 1) * columns] for row in range(rows)])
    else:
        values = of_method(name, image, 2)
    box = box_of(values, image.size, 36)
    found = vicrop.vicrop_qa(name, method, tmp_path / "image.png", QUESTION, model, processor, QUESTION, layer=2)
    assert found == (answer(name, [image]), answer(name, [image, image.crop(box)]), box)
    assert found[0] != found[1] and box != (0, 0, *image.size)


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"model_name": "blip"}, "model_name: expected one of 'llava', 'qwen2_5', got str 'blip'"),
        (ValueError, {"model_name": "llava"}, "model: expected the model_type 'llava' for llava, got 'qwen2_5_vl'"),
        (ValueError, {"method_name": "pure_grad"}, "method_name: expected one of 'rel_att', "),
        (ValueError, {"layer": None}, r"layer: expected the number of a layer with .*, \[0, 1, 2, 3\], got 22"),
        (ValueError, {"layer": -1}, "layer: expected the number"),
        (TypeError, {"layer": 1.5}, "layer: expected an integer"),
        (ValueError, {"question": " "}, "question: expected a string"),
        (TypeError, {"short_question": None}, "short_question: expected a string"),
    ],
)
def test_arguments_are_refused_before_the_image_is_read(
    error: type[Exception], change: dict[str, Any], message: str
) -> None:
    model, _, processor = models("qwen2_5")
    given = {
        "model_name": "qwen2_5", "method_name": "rel_att", "image_path": "missing.png", "question": QUESTION,
        "model": model, "processor": processor, "short_question": QUESTION, "layer": 1, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        vicrop.vicrop_qa(**given)


def test_a_general_map_of_0_is_refused_where_the_other_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that neither prompt looks at are 0."""
    model, _, processor = models("llava")
    dark = [3], [3]

    class Planted(vicrop.Decoder):
        def decode(self, groups: Any) -> Any:
            found = super().decode(groups)
            for branch, columns in zip(groups[0].branches, dark, strict=True):
                branch.maps.values[..., columns] = 0
            return found

    monkeypatch.setattr(vicrop, "Decoder", Planted)
    given = scene((91, 91)), asked("llava", QUESTION), asked("llava", GENERAL), model, processor
    found = vicrop.rel_attention_llava(*given, layer=2)
    expected = relative("llava", scene((91, 91)), 2)
    expected[0, 3] = 0
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    dark = [3], [3, 5]
    with pytest.raises(ValueError, match="general_prompt: expected attention to each token that the prompt looks at"):
        vicrop.rel_attention_llava(*given, layer=2)


def test_gradient_attention_of_a_layer_with_a_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, processor = models("llava")
    monkeypatch.setattr(model.config.text_config, "sliding_window", 8, raising=False)
    given = scene((91, 91)), asked("llava", QUESTION), asked("llava", GENERAL), model, processor
    with pytest.raises(ValueError, match="layer: expected one whose last row sees every token, got 2"):
        vicrop.gradient_attention_llava(*given, layer=2)


def test_a_prompt_that_does_not_show_the_image_once_is_refused() -> None:
    model, _, processor = models("llava")
    image, good = scene((60, 60)), asked("llava", GENERAL)
    with pytest.raises(ValueError, match=r"^prompt: expected '<image>' once, where the image is, got it 0 times"):
        vicrop.rel_attention_llava(image, "what is red?", good, model, processor, layer=1)
    with pytest.raises(ValueError, match=r"^general_prompt: expected '<image>' once, .* got it 2 times"):
        vicrop.rel_attention_llava(image, good, "<image>" + good, model, processor, layer=1)
    with pytest.raises(TypeError, match="image: expected a PIL image"):
        vicrop.rel_attention_llava("image.png", good, good, model, processor, layer=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^prompt: expected a string"):
        vicrop.rel_attention_qwen2_5(image, " ", QUESTION, models("qwen2_5")[0], models("qwen2_5")[2], layer=1)


def box_of(values: Any, size: tuple[int, int], side: int) -> tuple[float, float, float, float]:
    """The box by its definition: every window of every ratio, ordered by what decides between them."""
    rows, columns = values.shape
    wide, high = size[0] / columns, size[1] / rows
    candidates = []
    for order, ratio in enumerate([1, 1.2, 1.4, 1.6, 1.8, 2]):
        w, h = min(int(side * ratio / wide), columns), min(int(side * ratio / high), rows)
        if (w, h) == (columns, rows):
            if not order:
                return (0, 0, *size)
            continue
        sums = {
            (x, y): float(values[y : y + h, x : x + w].sum())
            for x, y in product(range(columns - w + 1), range(rows - h + 1))
        }
        x, y = min(sums, key=lambda place: (-sums[place], place))
        around = [sums[at] for at in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if at in sums]
        candidates.append((-(sums[x, y] - sum(around) / len(around)) / (w * h), order, ratio, x, y, w, h))
    _, _, ratio, x, y, w, h = min(candidates)
    half = side * ratio // 2
    found = []
    for start, count, token, length in ((x, w, wide, size[0]), (y, h, high, size[1])):
        middle: float = int(start * token + token * count / 2)
        middle = half if middle < half else middle
        middle = length - half if middle > length - half else middle
        found.append((max(0, middle - half), min(length, middle + half)))
    return found[0][0], found[1][0], found[0][1], found[1][1]


@pytest.mark.parametrize("size", [(800, 600), (501, 977), (337, 2200), (1333, 340), (120, 90)])
@pytest.mark.parametrize("grid", [(24, 24), (7, 13)])
def test_the_box_equals_its_definition(grid: tuple[int, int], size: tuple[int, int]) -> None:
    """Small integers, so that windows and ratios are equal often and sums are exact, and values that are not."""
    random = np.random.default_rng(0)
    boxes = set()
    for case in range(12):
        counts = random.integers(0, 3, grid) if case % 3 else (random.random(grid) > 0.95).astype(int)
        values = counts.astype(np.float32) if case % 2 else counts + random.random(grid)
        found = vicrop.bbox_from_att_image_adaptive(values, size, 336)
        assert found == box_of(values, size, 336)
        assert all(type(edge) is int for edge in found)
        boxes.add(found)
    assert len(boxes) == 1 if size == (120, 90) else len(boxes) > 2


def test_among_equal_windows_the_first_column_wins_and_then_the_first_row() -> None:
    """Two tokens alone, each in many windows; row by row, the other one would be first."""
    values = np.zeros((10, 10), dtype=np.float32)
    values[2, 7] = values[7, 2] = 1
    # Side 1 has no tie within a peak, larger ones are less sharp.
    assert vicrop.bbox_from_att_image_adaptive(values, (100, 100), 10) == (20, 70, 30, 80)
    values[4, 2] = 1
    assert vicrop.bbox_from_att_image_adaptive(values, (100, 100), 10) == (20, 40, 30, 50)
    assert vicrop.bbox_from_att_image_adaptive(np.ones((10, 10)), (100, 100), 30) == (0, 0, 30, 30)


def test_the_ratio_is_that_of_the_sharpest_window() -> None:
    values = np.zeros((20, 20))
    values[4:10, 6:12] = 1
    values[3, 5:13] = values[10, 5:13] = values[3:11, 5] = values[3:11, 12] = -9
    # 6 x 6 tokens of 10 pixels: 60 = 50 * 1.2.
    assert vicrop.bbox_from_att_image_adaptive(values, (200, 200), 50) == (60, 40, 120, 100)


@pytest.mark.parametrize(
    ("size", "threshold", "rows", "columns"),
    [((1500, 2049), 1024, 3, 2), ((3000, 1000), 1024, 1, 3), ((101, 67), 32, 3, 4), ((64, 64), 64, 1, 1),
     ((10, 90), 40, 3, 1)],
)  # fmt: skip
def test_an_image_is_split_into_parts_of_one_size(
    size: tuple[int, int], threshold: int, rows: int, columns: int
) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (size[1], size[0], 3), dtype=np.uint8)
    parts, down, across = vicrop.high_res_split_threshold(Image.fromarray(pixels), threshold)
    assert (down, across, len(parts)) == (rows, columns, rows * columns)
    high, wide = -(-size[1] // rows), -(-size[0] // columns)
    whole = np.zeros((rows * high, columns * wide, 3), dtype=np.uint8)
    whole[: size[1], : size[0]] = pixels
    for number, part in enumerate(parts):
        y, x = number // columns * high, number % columns * wide
        np.testing.assert_array_equal(np.asarray(part), whole[y : y + high, x : x + wide])


def test_maps_of_the_parts_are_side_by_side() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1030, 1600, 3), dtype=np.uint8))

    def map_func(part: Image.Image, *given: Any) -> Any:
        assert given == ("a", "b", "model", "processor")
        return np.full((2, 3), np.asarray(part).mean())

    found = vicrop.high_res(map_func, image, "a", "b", "model", "processor")
    assert found.shape == (4, 9)
    parts, rows, columns = vicrop.high_res_split_threshold(image)
    expected = np.array([np.asarray(part).mean() for part in parts]).reshape(rows, columns)
    np.testing.assert_array_equal(found[::2, ::3], expected)


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"att_map": np.ones(24)}, "att_map: expected finite numbers"),
        (ValueError, {"att_map": np.full((4, 4), np.nan)}, "att_map: expected finite numbers"),
        (ValueError, {"att_map": np.full((4, 4), np.inf)}, "att_map: expected finite numbers"),
        (TypeError, {"att_map": np.array([["a"]])}, "att_map: expected numbers"),
        (TypeError, {"image_size": 100}, "image_size: expected .width, height."),
        (ValueError, {"image_size": (100, 0)}, r"image_size\[1\]: expected an integer"),
        (TypeError, {"bbox_size": 33.6}, "bbox_size: expected an integer"),
        (ValueError, {"bbox_size": 24}, "bbox_size: expected at least the 25 pixels of a token, got 24"),
    ],
)
def test_a_box_that_is_not_known_is_refused(error: type[Exception], change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"att_map": np.ones((4, 4)), "image_size": (100, 80), "bbox_size": 30, **change}
    with pytest.raises(error, match=message):
        vicrop.bbox_from_att_image_adaptive(**given)


def test_parts_that_are_not_known_are_refused() -> None:
    image = Image.new("RGB", (20, 20))
    with pytest.raises(TypeError, match="image: expected a PIL image"):
        vicrop.high_res_split_threshold(np.ones((3, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="res_threshold: expected an integer"):
        vicrop.high_res_split_threshold(image, 0)
    with pytest.raises(TypeError, match="map_func: expected a function"):
        vicrop.high_res("rel_att", image, "a", "b", None, None)  # type: ignore[arg-type]
