"""Photos with every EXIF orientation give the results of upright images."""

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
def test_rotated_photos_give_the_results_of_upright_images(name: str, suffix: str, tmp_path: Path) -> None:
    engine = CarveEngine(*family(name), preset=QUICK, memory=False)
    photos = [tagged_photo(tmp_path / f"{orientation}.{suffix}", orientation) for orientation in range(2, 9)]
    upright = [ImageOps.exif_transpose(Image.open(photo)).convert("RGB") for photo in photos]
    expected = engine([Image.frombytes("RGB", image.size, image.tobytes()) for image in upright], QUESTION)
    results_of_photos = engine(photos, QUESTION)
    repeated = engine([result.image for result in results_of_photos], QUESTION)
    for results in (results_of_photos, repeated, engine([Image.open(photo) for photo in photos[-2:]], QUESTION)):
        for result, image, reference in zip(reversed(results), reversed(upright), reversed(expected), strict=False):
            assert result.error is None and result.image.size == image.size
            assert result.image.tobytes() == image.tobytes()
            torch.testing.assert_close(
                result.saliency, reference.saliency, rtol=1e-4, atol=1e-5 * float(reference.saliency.max())
            )
            assert result.box == reference.box and result.refined.tobytes() == reference.refined.tobytes()
            assert result.refined.getexif().get(0x0112) is None
