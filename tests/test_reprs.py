"""Results print in one short line that says what they are, with tensors by dtype and shape."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import carve_kernels
from carve_kernels import CarveEngine, Preset, View
from tests.support.families import family
from tests.support.tiny_models import make_image

TASK, GENERAL = torch.rand(2, 3, 24) + 0.1, torch.rand(2, 3, 24) + 0.1
VIEWS = [View(torch.arange(12) + 12 * i, (3, 4), (0, 0, 80, 60), 0, (i, i + 1), "frame") for i in range(2)]


def results() -> dict[str, object]:
    saliency = carve_kernels.contrast(TASK, GENERAL, (4, 6), (60, 80))
    image = Image.new("RGB", (80, 60), "gray")
    query, key, tokens = torch.rand(1, 4, 1, 32), torch.rand(1, 2, 30, 32), torch.arange(24)[None]
    result = CarveEngine(*family("llava"), preset=Preset.paper(max_new_tokens=2), memory=False)(
        make_image(60, 40, 1), "what digit is red " * 40
    )
    return {
        "View": VIEWS[0],
        "Regions": carve_kernels.regions(saliency, keep=0.4, top=2),
        "CarveOutcome": carve_kernels.carve(image, TASK, GENERAL, grid=(4, 6)),
        "VideoSaliency": carve_kernels.contrast_frames(TASK, GENERAL, VIEWS, (60, 80)),
        "Saliency": carve_kernels.saliency(query, key, tokens, torch.ones(1, 24), (4, 6), (60, 80), scale=0.2),
        "CarveResult": result,
        "CarvedImage": result.images[0],
        "AttentionMaps": result.task,
    }


def test_every_result_prints_in_one_line() -> None:
    for name, result in results().items():
        text = repr(result)
        assert text.startswith(f"{name}(") and len(text) < 500 and "\n" not in text and "tensor(" not in text, text


def test_what_a_result_says() -> None:
    found = results()
    assert repr(found["View"]) == (
        "View(tokens=int64 [12], grid=(3, 4), box=(0, 0, 80, 60), image=0, kind='frame', frame=(0, 1))"
    )
    result = found["CarveResult"]
    assert isinstance(result, carve_kernels.CarveResult)
    text = repr(result)
    for part in (f"answer={result.answer!r}", f"box={result.box}", "image=<60 x 40 pixels>", "reason=None"):
        assert part in text
    assert "question='what digit is red " in text and "..." in text


@pytest.mark.parametrize("value", [1.23456, [torch.zeros(2, 3)], None])
def test_short_facts(value: object) -> None:
    from carve_kernels.types import brief

    wanted = {"1.23456": "1.23", "None": "None"}.get(repr(value), "[float32 [2, 3]]")
    assert brief(value, fact=value) == f"{type(value).__name__}(fact={wanted})"
