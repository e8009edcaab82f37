"""Zoom: mask, crop, sizes, the limit, modes of images, and errors."""

from __future__ import annotations

import logging
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carve_kernels import zoom
from carve_kernels.ops.zoom import to_rgb


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = numpy.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=numpy.uint8)
    return Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels, mode if mode != "P" else None)


def test_outside_the_mask_is_the_fill_and_the_rest_is_cropped() -> None:
    image = noise(11, 7)
    mask = torch.zeros(7, 22, dtype=torch.bool)[:, ::2]
    mask[2:5, 3:9] = True
    mask[3, 4] = False
    found = zoom(image, mask, (2, 1, 9, 6), fill=(9, 8, 7), resample="nearest", size=(5, 7))
    expected = numpy.where(mask.numpy()[..., None], numpy.asarray(image), (9, 8, 7))[1:6, 2:9]
    assert numpy.array_equal(numpy.asarray(found), expected)
    untouched = zoom(image, None, (0, 0, 11, 7))
    assert untouched.tobytes() == image.tobytes() and untouched is not image


@pytest.mark.parametrize(("size", "expected"), [("longer", (100, 50)), ("cover", (120, 60)), ((30, 11), (11, 30))])
def test_sizes(size: Any, expected: tuple[int, int]) -> None:
    assert zoom(noise(100, 60), None, (10, 10, 50, 30), size=size).size == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(1, 60), height=st.integers(1, 60), size=st.sampled_from(["longer", "cover"]))
def test_laws_of_size(data: Any, width: int, height: int, size: str) -> None:
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    limit = data.draw(st.sampled_from([1.0, 2.5, 4.0, 1000.0]))
    found = zoom(Image.new("RGB", (width, height)), None, (x0, y0, x1, y1), size=size, limit=limit)
    assert found.width * found.height <= limit * width * height
    assert found.width >= x1 - x0 and found.height >= y1 - y0
    if limit == 1000.0:
        short = (found.width < width - 1) + (found.height < height - 1)
        assert short == 0 if size == "cover" else max(found.size) == max(width, height)


def test_the_limit_reduces_the_size_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (400, 100))
    with caplog.at_level(logging.INFO, logger="carve_kernels"):
        assert zoom(image, None, (0, 0, 40, 40), size="cover").size == (400, 400)
        assert not caplog.records
        capped = zoom(image, None, (0, 0, 20, 80), size="cover")
        assert capped.size == (200, 800) and capped.width < image.width
        assert "capped" in caplog.text
        assert zoom(image, None, (0, 0, 20, 80), size="cover", limit=16).size == (400, 1600)
        assert zoom(image, None, (0, 0, 40, 40), size="longer", limit=1).size == (200, 200)
        assert zoom(image, None, (0, 0, 40, 40), size=(400, 1600), limit=1).size == (400, 100)
        assert zoom(image, None, (0, 0, 40, 40), size=(10**9, 1), limit=1).size == (1, 40_000)


def test_one_pixel() -> None:
    image = Image.new("RGB", (1, 1), (1, 2, 3))
    for size in ("longer", "cover", (2, 2)):
        assert zoom(image, torch.ones(1, 1, dtype=torch.bool), (0, 0, 1, 1), size=size).getpixel((0, 0)) == (1, 2, 3)
    assert zoom(image, torch.zeros(1, 1, dtype=torch.bool), (0, 0, 1, 1)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = noise(9, 5).convert("LAB") if mode == "LAB" else noise(9, 5).convert(mode)
    assert zoom(image, None, (0, 0, 9, 5)).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    found = to_rgb("image", image.convert(mode))
    assert found.mode == "RGB" and found.getpixel((1, 0)) == (255, 255, 255) != found.getpixel((0, 0))
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert to_rgb("image", palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_high_byte() -> None:
    image = Image.fromarray(numpy.array([[0x1234, 0xFFFF]], dtype=numpy.uint16))
    assert [to_rgb("image", image).getpixel((x, 0))[0] for x in (0, 1)] == [0x12, 0xFF]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": numpy.zeros((4, 6, 3))}, TypeError, "image: expected a PIL image"),
        ({"image": Image.new("F", (6, 4))}, ValueError, "image: expected an 8- or 16-bit mode"),
        ({"image": Image.new("RGB", (0, 4))}, ValueError, "image: expected at least one pixel"),
        ({"mask": torch.ones(4, 6)}, TypeError, "mask: expected dtype torch.bool"),
        (
            {"mask": torch.ones(6, 4, dtype=torch.bool)},
            ValueError,
            "mask: expected 4 x 6 .* like the image, got 6 x 4",
        ),
        ({"box": (0, 0, 7, 4)}, ValueError, "box: expected 0 <= x0 < x1 <= 6 .* got .0, 0, 7, 4."),
        ({"box": (-1, 0, 6, 4)}, ValueError, "box: expected"),
        ({"box": (3, 0, 3, 4)}, ValueError, "box: expected"),
        ({"box": (0.5, 0, 3, 4)}, TypeError, "box.0.: expected an integer"),
        ({"box": (0, 0, 3)}, TypeError, "box: expected four integers"),
        ({"fill": (0, 0, 256)}, ValueError, "fill.2."),
        ({"fill": "black"}, TypeError, "fill: expected three values"),
        ({"resample": "cubic"}, ValueError, "resample: expected one of"),
        ({"size": "shorter"}, ValueError, "size: expected one of"),
        ({"limit": 0.5}, ValueError, "limit: expected a number of at least 1"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        zoom(**{"image": noise(6, 4), "mask": None, "box": (0, 0, 6, 4), **changes})
