"""Photos of every orientation through `run` and `batch`: they write upright images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image, ImageOps

from tests.cli.conftest import QUESTION, Ask, Invoke, records
from tests.support.families import tagged_photo


def test_the_image_of_run_equals_the_upright_photo(run: Invoke, tmp_path: Path) -> None:
    photo = tagged_photo(tmp_path / "photo.jpg", 3)
    with Image.open(photo) as stored:
        upright = ImageOps.exif_transpose(stored)
    values = []
    for path in (photo, tmp_path / "again.png"):
        outcome = run("-i", path)
        assert outcome.exit_code == 0, outcome.output
        with Image.open(tmp_path / "out/image.png") as written:
            assert ImageOps.exif_transpose(written).tobytes() == upright.tobytes() == written.tobytes()
        shutil.copy(tmp_path / "out/image.png", tmp_path / "again.png")
        (numbers,) = json.loads((tmp_path / "out/result.json").read_text())["presets"].values()
        values.append({key: numbers[key] for key in ("answer", "refined_answer", "box", "boxes", "scores", "entropy")})
    assert values[0] == values[1]


def test_batch_sees_every_orientation_upright(ask: Ask, folder: Path) -> None:
    photos = {
        f"{orientation}.{suffix}": tagged_photo(folder / f"{orientation}.{suffix}", orientation)
        for suffix in ("jpg", "png", "webp")
        for orientation in range(2, 9)
    }
    lines = [{"image": name, "question": QUESTION, "id": name} for name in photos]
    outcome = ask(lines, "--max-new-tokens", 1, "--steps", "t_start")
    assert outcome.exit_code == 0, outcome.output
    for name, values in records(folder).items():
        with Image.open(photos[name]) as stored:
            upright = ImageOps.exif_transpose(stored)
        assert values["image"] == {"width": upright.width, "height": upright.height}
        (numbers,) = values["presets"].values()
        left, top, right, bottom = numbers["views"][0]["box"]
        assert (left + right, top + bottom) == upright.size
