"""Photos of every orientation through the engine: what it saw of them is what it sees of the upright pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from carve_kernels import CarveEngine, Preset
from tests.support.families import family, tagged_photo

QUESTION = "what digit is red"
QUICK = Preset.paper(layers=(1, 2), max_new_tokens=1)


@pytest.mark.parametrize(("name", "suffix"), [("llava", "png"), ("qwen2_vl", "jpg")])
def test_turned_photos_are_the_upright_pictures(name: str, suffix: str, tmp_path: Path) -> None:
    engine = CarveEngine(*family(name), preset=QUICK, memory=False)
    photos = [tagged_photo(tmp_path / f"{orientation}.{suffix}", orientation) for orientation in range(2, 9)]
    upright = [ImageOps.exif_transpose(Image.open(photo)).convert("RGB") for photo in photos]
    expected = engine([Image.frombytes("RGB", image.size, image.tobytes()) for image in upright], QUESTION)
    once = engine(photos, QUESTION)
    again = engine([result.image for result in once], QUESTION)
    for results in (once, again, engine([Image.open(photo) for photo in photos[-2:]], QUESTION)):
        for result, image, plain in zip(reversed(results), reversed(upright), reversed(expected), strict=False):
            assert result.error is None and result.image.size == image.size
            assert result.image.tobytes() == image.tobytes()
            torch.testing.assert_close(
                result.saliency, plain.saliency, rtol=1e-4, atol=1e-5 * float(plain.saliency.max())
            )
            assert result.box == plain.box and result.refined.tobytes() == plain.refined.tobytes()
            assert result.refined.getexif().get(0x0112) is None
