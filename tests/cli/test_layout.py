"""carve-kernels doctor --model: the layout of a checkpoint, drawn and compared with what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import View, VisualLayout, layout_of
from carve_kernels.cli.layout_figure import colour_of, layout_figure
from carve_kernels.hf import families
from tests.cli.conftest import Invoke


@pytest.fixture
def show(carve: Invoke, checkpoint: Path, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setenv("COLUMNS", "200")
    words = ("doctor", "-m", checkpoint, "-i", image_file, "-o", tmp_path / "out")
    return lambda *more: carve(*words, *more)


def test_the_layout_of_a_family(show: Invoke, tmp_path: Path) -> None:
    done = show()
    assert done.exit_code == 0, done.output
    for words in ("llava: 36 image tokens of 160 x 96 pixels", "6 x 6", "0 to 35", "32.0, 0.0, 128.0, 96.0"):
        assert words in done.stdout, words
    assert "the layout of the family; its boxes differ from the measured ones by at most 0.00" in done.stdout
    assert "the model does not see 40.0% of the image" in done.stdout
    with Image.open(tmp_path / "out" / "layout.png") as figure:
        assert figure.info["Software"] == "carve_kernels" and min(figure.size) > 300
    # It replaces its own file, and no other.
    assert show().exit_code == 0
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "layout.png")
    done = show()
    assert done.exit_code == 2 and "was not written by this version of carve_kernels" in done.stderr


def test_without_an_image_it_draws_one_of_its_own(
    carve: Invoke, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = carve("doctor", "--model", checkpoint)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "doctor" / "layout.png").is_file()


def test_a_layout_that_is_off_is_said(show: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*args: Any) -> VisualLayout:
        layout = layout_of(*args)
        views = tuple(replace(view, box=(0.0, 0.0, 160.0, 96.0)) for view in layout.views[0])
        return replace(layout, views=(views,))

    monkeypatch.setattr("carve_kernels.hf.layouts.layout_of", off)
    done = show()
    assert done.exit_code == 1 and "by at most 1.2" in done.stdout
    assert "does not see" not in done.stdout


def test_a_family_that_is_not_listed(show: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.FAMILIES, "llava")
    done = show()
    assert done.exit_code == 0, done.output
    assert "no layout is known for this family, so the boxes were measured; the model does not see 40.0%" in done.stdout


def test_an_image_without_a_model(carve: Invoke, image_file: Path) -> None:
    done = carve("doctor", "--image", image_file)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: --image: expected --model with it, got none")


def test_views_that_overlap_are_drawn_side_by_side() -> None:
    """Each token has its number and the colour of its view; what no view covers is dark."""
    whole = View(torch.tensor([4, 5]), (1, 2), (0.0, 0.0, 60.0, 40.0))
    tile = View(torch.tensor([7]), (1, 1), (0.0, 0.0, 30.0, 40.0), kind="tile")
    layout = VisualLayout(((whole, tile),), (((40, 60),),))
    image = Image.new("RGB", (60, 40), (200, 200, 200))
    figure = layout_figure(image, layout, {4: 0, 5: 1, 7: 3}, "title", "caption")
    one = layout_figure(image, VisualLayout(((whole,),), layout.sizes), {4: 0, 5: 1}, "title", "caption")
    assert figure.width > 1.9 * (one.width - 48)
    colours = {tuple(colour) for colour in numpy.asarray(figure).reshape(-1, 3)}
    assert colour_of(0) in colours and colour_of(1) in colours and colour_of(2) not in colours
    # The right half of the second tile is in no view.
    assert numpy.asarray(figure)[-60:-40, -60:-40].mean() < 110
