"""Images of results: colours in order, overlays in position, panels with images and text of every size."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import regions
from carve_kernels.visualize import LONGEST, Scale, Tile, kept, overlay, panel, saliency_image


def lightness(pixels: Any) -> numpy.ndarray:
    """CIE L* of sRGB pixels."""
    linear = (numpy.asarray(pixels, dtype=numpy.float64) / 255) ** 2.2
    return 116 * numpy.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16


def test_more_is_lighter_in_even_steps() -> None:
    ramp = torch.linspace(0, 1, 256)[None]
    steps = numpy.diff(lightness(saliency_image(ramp))[0])
    assert (steps > 0).all() and steps.max() < 4 * steps.mean()
    assert list(saliency_image(ramp, colour=False).tobytes()) == list(range(256))


def test_a_saliency_image_has_the_size_of_the_saliency() -> None:
    assert saliency_image(torch.rand(7, 13)).size == (13, 7)
    assert saliency_image(torch.full((3, 3), 2.0), colour=False).getextrema() == (0, 0)


def test_an_overlay_shows_the_spot_where_it_is() -> None:
    image = Image.new("RGB", (120, 60), (90, 90, 90))
    tokens = torch.zeros(6, 6)
    tokens[2, 1] = 1
    figure = lightness(overlay(image, tokens, box=(30, 0, 90, 60)))
    y, x = divmod(int(figure.argmax()), 120)
    assert 40 <= x < 50 and 20 <= y < 30
    assert numpy.ptp(figure[:, :30]) == 0 and numpy.ptp(figure[:, 90:]) == 0
    plain = overlay(image, tokens, alpha=0.0)
    assert plain.tobytes() == image.tobytes()


def test_pixels_outside_the_regions_are_dimmed() -> None:
    image = Image.new("RGB", (60, 40), (200, 180, 90))
    saliency = torch.zeros(40, 60)
    saliency[10:30, 20:50] = torch.rand(20, 30) + 1
    found = regions(saliency, keep=0.25, top=1)
    figure = kept(image, found)
    assert figure.size == image.size and figure.getpixel((35, 20)) == (200, 180, 90)
    assert lightness(figure.getpixel((2, 2))) < 0.7 * lightness(image.getpixel((2, 2)))
    nothing = kept(image, regions(saliency * 0, keep=0.25, top=1))
    assert nothing.tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3000, 7), (2500, 2100)])
def test_any_size_of_image(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "teal")
    saliency = torch.rand(size[1], size[0])
    found = regions(saliency, keep=0.2, top=1)
    images = [overlay(image, saliency), kept(image, found), overlay(image, torch.rand(3, 4))]
    assert all(max(figure.size) == min(LONGEST, max(size)) for figure in images)
    page = panel([[Tile(image, "original"), *(Tile(figure) for figure in images)]], tile=100)
    assert page.width == 4 * 100 + 5 * 24


def test_a_panel_has_even_columns_and_wraps_its_text() -> None:
    image = Image.new("RGB", (30, 20), (255, 0, 0))
    short = panel([[Tile(image, "one", "two")] * 3, [Tile(image)]], title="question", caption="answer", tile=120)
    long = panel([[Tile(image, "one", "two " * 60)] * 3, [Tile(None, "alone", "x" * 300)]], title="why " * 90, tile=120)
    assert short.width == long.width == 3 * 120 + 4 * 24 and long.height > short.height + 100
    red = (numpy.asarray(short) == (255, 0, 0)).all(-1)
    assert [column for column in range(short.width) if red[:, column].any()] == [
        24 + tile * 144 + column for tile in range(3) for column in range(120)
    ]
    margins = numpy.asarray(long)[:, -20:]
    assert (margins == 255).all()


def test_a_scale_has_the_colours_of_the_saliency_from_low_to_high() -> None:
    image = Image.new("L", (64, 64), 9)
    bare = panel([[Tile(image)]], tile=200, margin=0)
    scaled = numpy.asarray(panel([[Tile(image, scale=Scale("0.1%", "7%", "share"))]], tile=200, margin=0))
    bar = scaled[200 + 3]
    expected = numpy.asarray(saliency_image(torch.linspace(0, 1, 200)[None]))[0].astype(int)
    assert numpy.abs(bar.astype(int) - expected).max() <= 8
    below = scaled[bare.height + 8 :]
    for third in (slice(0, 50), slice(70, 130), slice(150, 200)):
        assert (below[:, third] < 128).any()


def test_a_panel_without_text_is_images_alone() -> None:
    page = panel([[Tile(Image.new("L", (64, 64), 9))]], tile=64, margin=0)
    assert page.size == (64, 64) and page.getpixel((32, 32)) == (9, 9, 9)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        panel([])
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        panel([[]])
    with pytest.raises(ValueError, match="tile: expected an integer of at least 64"):
        panel([[Tile(None)]], tile=3)
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1"):
        overlay(Image.new("RGB", (3, 3)), torch.rand(3, 3), alpha=2)
    with pytest.raises(ValueError, match=r"box: expected x0, y0, x1, y1 with x0 < x1 and y0 < y1, got"):
        overlay(Image.new("RGB", (3, 3)), torch.rand(3, 3), box=(2, 0, 1, 3))
    with pytest.raises(TypeError, match="image: expected a PIL image, got str"):
        overlay("image.png", torch.rand(3, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="saliency: expected finite values"):
        saliency_image(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="saliency: expected shape"):
        saliency_image(torch.rand(3))
