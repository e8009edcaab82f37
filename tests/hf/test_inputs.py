"""Images of every kind become upright RGB, prompts hold their images, and bad ones are named."""

from __future__ import annotations

import copy
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from carve_kernels import CarveEngine, Preset
from carve_kernels.hf.engine.cache import Memory
from carve_kernels.hf.inputs import build_prompt, open_image, prepare
from carve_kernels.hf.layouts import layout_of
from carve_kernels.hf.loading import load
from tests.support import tiny_models
from tests.support.families import FORMATS, tagged_photo


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    return tiny_models.tiny_llava()


@pytest.fixture(scope="module", params=[tiny_models.tiny_llava, tiny_models.tiny_qwen2_vl, tiny_models.tiny_qwen2_5_vl])
def family(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.param()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (5, 3), "white").convert(mode)
    opened = open_image(image)
    assert (opened.mode, opened.size) == ("RGB", (5, 3))
    assert np.asarray(opened).min() >= 254


def test_transparency_is_composed_over_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    half.save(tmp_path / "alpha.png")
    half.quantize(4).save(tmp_path / "palette.png")
    for name in ("alpha.png", "palette.png"):
        opened = open_image(tmp_path / name)
        assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    opened = open_image(str(tmp_path / "deep.png"))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_goes_with_the_turn(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tagged_photo(tmp_path / f"turned.{suffix}", orientation)
    with Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    first = open_image(path)
    with Image.open(path) as stored:
        assert open_image(stored).tobytes() == first.tobytes()
    assert (first.size, first.tobytes()) == (upright.size, upright.tobytes())
    # What is opened once more, or was written and is read again, stays as it is.
    assert open_image(first).tobytes() == first.tobytes()
    first.save(tmp_path / "again.png")
    assert open_image(tmp_path / "again.png").tobytes() == first.tobytes()
    assert first.transpose(Image.Transpose.ROTATE_90).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("key", ["exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"])
def test_an_orientation_is_taken_away_wherever_pillow_finds_it(key: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    xmp = '<rdf:Description tiff:Orientation="3"/>'
    values = {
        "exif": exif.tobytes(),
        "Raw profile type exif": "\nexif\n  10\n" + exif.tobytes().hex(),
        "XML:com.adobe.xmp": xmp,
        "xmp": xmp.encode(),
    }
    image = tiny_models.make_image(40, 24)
    image.info[key] = values[key]
    opened = open_image(image)
    assert opened.tobytes() == image.transpose(Image.Transpose.ROTATE_180).tobytes()
    assert opened.getexif().get(0x0112) is None and open_image(opened).tobytes() == opened.tobytes()
    assert image.info[key] == values[key]


def test_the_given_image_is_not_changed() -> None:
    image = tiny_models.make_image(8, 8)
    opened = open_image(image)
    opened.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)


def test_files_that_are_no_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image: .*none\.png is missing"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is not a file"):
        open_image(tmp_path)
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(ValueError, match=r"words\.png cannot be read as an image"):
        open_image(tmp_path / "words.png")
    tiny_models.make_image(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"half\.png cannot be read as an image"):
        open_image(tmp_path / "half.png")
    with pytest.raises(TypeError, match="expected a path or a PIL image, got int"):
        open_image(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floating-point"):
        open_image(Image.new("F", (2, 2)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_damaged_files_give_an_image_or_the_named_error(tmp_path: Path, suffix: str) -> None:
    tiny_models.make_image(48, 40).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    damaged = tmp_path / f"damaged.{suffix}"
    generator = np.random.default_rng(0)
    for _ in range(40):
        content = bytearray(whole)
        for place in generator.integers(0, len(content), 4):
            content[place] = int(generator.integers(0, 256))
        damaged.write_bytes(bytes(content[: generator.integers(1, len(content) + 1)]))
        try:
            assert open_image(damaged).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("image: ")


def test_a_path_need_not_be_unicode(tmp_path: Path) -> None:
    """Names of files are bytes on Linux; what is not UTF-8 in them comes as halves of characters."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes Unicode alone")
    tiny_models.make_image(8, 8).save(folder / "photo.png")
    assert open_image(folder / "photo.png").size == (8, 8)
    Memory(folder / "maps")
    assert (folder / "maps").is_dir()
    with pytest.raises(ValueError, match=r"^model: .*no config"):
        load(folder)


def test_too_many_pixels(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"400000000 pixels.*178956970.*raise max_image_pixels"):
        open_image(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"9 x 7 = 63 pixels, at most 62"):
        open_image(Image.new("L", (9, 7)), max_image_pixels=62)
    with pytest.raises(ValueError, match=r"400000000 pixels, at most 399999999"):
        open_image(tmp_path / "huge.png", max_image_pixels=399_999_999)
    assert Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (50, 3), (3, 50), (1, 150)])
def test_tiny_images_work(family: tuple[Any, Any], size: tuple[int, int]) -> None:
    model, processor = family
    image = open_image(Image.new("RGB", size, "red"))
    inputs = prepare(processor, [image], build_prompt(processor, "x"))
    view = layout_of(model, processor, inputs, [image]).views[0][0]
    assert view.box[2] > view.box[0]
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_prompt_is_the_chat_templates(family: tuple[Any, Any]) -> None:
    processor = family[1]
    for count in (0, 1, 2):
        prompt = build_prompt(processor, "what digit is red", count)
        assert prompt == tiny_models.prompts_for(processor, ["what digit is red"], [count])[0]
        assert prompt.count(processor.image_token) == count


def test_prompt_without_a_template_and_with_one_that_drops_images(llava: tuple[Any, Any]) -> None:
    processor = copy.copy(llava[1])
    processor.chat_template = None
    assert build_prompt(processor, "x") == "<image>\nx"
    assert build_prompt(processor, "x", 2) == "<image>\n<image>\nx"
    processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(ValueError, match=r"chat template put 0 image\(s\) in the prompt, expected 1"):
        build_prompt(processor, "x")


TEXTS_ALONE = [
    "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:",
    "{% for m in messages %}USER: {{ m['content'] | trim }} {% endfor %}ASSISTANT:",
    "{% for m in messages %}{{ 'USER: ' + m['content'].strip() + ' ' }}{% endfor %}ASSISTANT:",
    "{% for m in messages %}{{ 'USER: ' + m['content'] + ' ' }}{% endfor %}ASSISTANT:",
]


@pytest.mark.parametrize("named", [False, True])
def test_a_template_that_only_the_tokenizer_has_is_used(family: tuple[Any, Any], named: bool) -> None:
    processor = copy.copy(family[1])
    processor.tokenizer = copy.copy(processor.tokenizer)
    own = processor.chat_template
    processor.chat_template = None
    processor.tokenizer.chat_template = {"default": own, "tool_use": "no"} if named else own
    for count in (0, 1, 2):
        assert build_prompt(processor, "what digit is red", count) == build_prompt(
            family[1], "what digit is red", count
        )
    # The processor's own goes first.
    processor.chat_template = own.replace("assistant", "helper").replace("ASSISTANT", "HELPER")
    assert "helper" in build_prompt(processor, "what digit is red").lower()


@pytest.mark.parametrize("owner", ["processor", "tokenizer"])
@pytest.mark.parametrize("template", TEXTS_ALONE)
def test_a_template_for_texts_gets_the_images_in_the_text(family: tuple[Any, Any], template: str, owner: str) -> None:
    processor = copy.copy(family[1])
    processor.tokenizer = copy.copy(processor.tokenizer)
    processor.chat_template = template if owner == "processor" else None
    processor.tokenizer.chat_template = template if owner == "tokenizer" else None
    mark = "<image>\n" if "<image>" in processor.image_token else "<|vision_start|><|image_pad|><|vision_end|>"
    for count in (0, 1, 2):
        assert build_prompt(processor, "it's red", count) == f"USER: {mark * count}it's red ASSISTANT:"
    processor.chat_template = processor.tokenizer.chat_template = None
    assert build_prompt(processor, "it's red", 2) == f"{mark * 2}it's red"


@pytest.mark.parametrize(
    "template",
    [
        {"rag": "a", "tool_use": "b"},
        "<image> of nothing",
        "{{ raise_exception('no') }}",
        "{{ messages[0]['content'] | tojson }}<image>",
    ],
)
def test_templates_that_cannot_be_used_are_refused(llava: tuple[Any, Any], template: Any) -> None:
    processor = copy.copy(llava[1])
    processor.chat_template = template
    with pytest.raises(ValueError, match=r"^processor: "):
        build_prompt(processor, "what digit is red")


@pytest.mark.parametrize("half", ["\ud800", "red \udfff?", "\ud83d\ude00"])
def test_halves_of_characters_are_refused_by_name(llava: tuple[Any, Any], half: str) -> None:
    engine = CarveEngine(*llava, preset={"layers": [1]})
    with pytest.raises(ValueError, match=r"^question: "):
        engine(tiny_models.make_image(60, 60), half)
    with pytest.raises(ValueError, match=r"^prompt: "):
        engine(tiny_models.make_image(60, 60), "x", f"<image>{half}")
    with pytest.raises(ValueError, match=r"^text: "):
        build_prompt(llava[1], half)
    for name in ("general_prompt", "suffix"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            Preset.paper(**{name: half})


def test_bad_texts(llava: tuple[Any, Any]) -> None:
    processor = llava[1]
    for text in ("", "  \n"):
        with pytest.raises(ValueError, match="text: expected a string with at least one visible"):
            build_prompt(processor, text)
    with pytest.raises(ValueError, match="contains the image token '<image>'"):
        build_prompt(processor, "what is <image>?")
    with pytest.raises(TypeError, match="text: expected a string"):
        build_prompt(processor, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_images"):
        build_prompt(processor, "x", -1)


def test_images_must_fit_the_prompt(family: tuple[Any, Any]) -> None:
    processor = family[1]
    image = tiny_models.make_image(60, 60)
    with pytest.raises(ValueError, match=r"the prompt has 1 image\(s\), got 2"):
        prepare(processor, [image, image], build_prompt(processor, "x"))
    with pytest.raises(ValueError, match=r"the prompt has 0 image\(s\), got 1"):
        prepare(processor, [image], build_prompt(processor, "x", 0))
    assert "pixel_values" not in prepare(processor, [], build_prompt(processor, "x", 0))


def test_inputs_are_those_of_the_processor(family: tuple[Any, Any]) -> None:
    processor = family[1]
    image = tiny_models.make_image(90, 60)
    inputs = prepare(processor, [image], build_prompt(processor, "x"), device="cpu")
    expected = tiny_models.inputs_for(processor, [image], ["x"])
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_max_pixels_bounds_the_grid_and_leaves_the_processor_alone() -> None:
    _, processor = tiny_models.tiny_qwen2_5_vl()
    before = dict(processor.image_processor.size)
    image = tiny_models.make_image(400, 200)
    prompt = build_prompt(processor, "x")
    for limit in (56 * 56 * 4, 28 * 28):
        _, rows, columns = prepare(processor, [image], prompt, max_pixels=limit)["image_grid_thw"][0].tolist()
        assert rows * columns * 14 * 14 <= limit
    assert dict(processor.image_processor.size) == before
    free = prepare(processor, [image], prompt)["image_grid_thw"]
    assert int(free.prod()) * 14 * 14 > 56 * 56 * 4
    with pytest.raises(ValueError, match="max_pixels"):
        prepare(processor, [image], prompt, max_pixels=0)


@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
@pytest.mark.parametrize("style", ["size", "attributes"])
@pytest.mark.parametrize("make", [tiny_models.tiny_qwen2_vl, tiny_models.tiny_qwen2_5_vl])
def test_the_smaller_of_two_bounds_holds(make: Any, style: str) -> None:
    image, (_, processor) = tiny_models.make_image(400, 200), make()

    def pixels(least: int, most: int, max_pixels: int | None) -> int:
        if style == "size":
            processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}
        else:
            processor.image_processor.min_pixels, processor.image_processor.max_pixels = least, most
        inputs = prepare(processor, [image], build_prompt(processor, "x"), max_pixels=max_pixels)
        return int(inputs["image_grid_thw"].prod()) * 14 * 14

    small, large = 28 * 28 * 10, 28 * 28 * 60
    unbounded = pixels(28 * 28, small, None)
    assert unbounded <= small
    # A bound of ours changes nothing where the processor's own is smaller, and takes its place where it is larger.
    assert pixels(28 * 28, small, large) == pixels(28 * 28, small, 2 * large) == unbounded
    assert pixels(28 * 28, large, small) == unbounded < pixels(28 * 28, large, None)
    # An upper bound takes precedence over a lower one.
    assert pixels(large, 2 * large, small) <= small and pixels(large, small, 2 * large) <= small


def test_the_engine_keeps_a_processors_own_bound() -> None:
    model, processor = tiny_models.tiny_qwen2_vl()
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12}
    inputs = prepare(processor, [tiny_models.make_image(400, 200)], build_prompt(processor, "x"))
    own = int(inputs["image_grid_thw"].prod()) // 4
    preset = {"layers": [1], "max_new_tokens": 1, "max_pixels": 448 * 448}
    result = CarveEngine(model, processor, preset=preset)(tiny_models.make_image(400, 200), "what digit is red")
    assert result.task.values.shape[-1] == result.general.values.shape[-1] == own <= 12


def test_max_pixels_is_nothing_to_a_processor_of_a_fixed_size(llava: tuple[Any, Any]) -> None:
    processor = llava[1]
    image = tiny_models.make_image(90, 60)
    inputs = prepare(processor, [image], build_prompt(processor, "x"), max_pixels=10)
    assert inputs["pixel_values"].shape == (1, 3, 84, 84)


@pytest.mark.parametrize(
    "entry",
    [(0x100, 2, 4, b"640\0"), (0x128, 2, 2, b"2\0\0\0"), (0x11A, 2, 3, b"72\0\0"), (0x131, 1, 3, b"abc\0")],
    ids=["width", "unit", "resolution", "software"],
)
def test_an_image_with_damaged_notes_is_turned(tmp_path: Path, entry: tuple[int, int, int, bytes]) -> None:
    turned = (0x112, 3, 1, struct.pack("<HH", 6, 0))
    notes = b"".join(struct.pack("<HHI", *each[:3]) + each[3] for each in sorted([turned, entry]))
    path = tmp_path / "photo.jpg"
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + notes + bytes(4)
    tiny_models.make_image(40, 24).save(path, exif=exif)
    assert open_image(path).size == (24, 40)


def test_whatever_a_decoder_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.png"
    tiny_models.make_image(8, 8).save(path)

    def load(*_: Any) -> None:
        raise RuntimeError("Failed to decode frame")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match=r"photo\.png cannot be read as an image \(Failed to decode frame\)"):
        open_image(path)
    with pytest.raises(ValueError, match="is missing"):
        open_image(tmp_path / ("x" * 300))
