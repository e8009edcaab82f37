"""CarveEngine: which profiles, images and arguments it takes, and what it says of those it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, layout_of, load
from carve_kernels.hf.profile.profile import Probe, profile
from tests.support.families import family, state
from tests.support.tiny_models import make_image, save, tiny_llava

QUESTION = "what digit is red"
SHORT = Preset.paper(max_new_tokens=6)
PHOTO = make_image(240, 160, 1)


def test_a_profile_is_used_unless_the_caller_says_otherwise(tmp_path: Path) -> None:
    directory = save(*tiny_llava(), tmp_path / "model")
    profile = {"preset": "paper", "layers": [0, 1], "steps": "t_start", "max_new_tokens": 3}
    model, processor = load(directory)
    assert CarveEngine(model, processor).preset == Preset.paper()
    (directory / "carve.json").write_text(json.dumps(profile))
    engine = CarveEngine(model, processor)
    assert engine.layers == (0, 1) and engine.preset == Preset.from_dict(profile)
    assert CarveEngine(model, processor, profile=False).preset == Preset.paper()
    assert CarveEngine(model, processor, preset="paper").preset == Preset.paper()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"layers": [2]}))
    assert CarveEngine(model, processor, profile=other).layers == (2,)
    assert CarveEngine(model, processor, profile={"layers": [3]}).layers == (3,)
    with pytest.raises(ValueError, match=r"profile: expected the path of a carve\.json"):
        CarveEngine(model, processor, profile=tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"^profile: .*'layer' \(did you mean 'layers'"):
        CarveEngine(model, processor, profile={"layer": [3]})
    (directory / "carve.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        CarveEngine(model, processor)


def test_layers_that_the_model_lacks() -> None:
    model, processor = family("llava")
    with pytest.raises(ValueError, match="expected layers 20 to 25 for preset release, got a model of 4 layers"):
        CarveEngine(model, processor, preset="release")
    with pytest.raises(ValueError, match="layers: expected numbers from -4 to 3"):
        CarveEngine(model, processor, preset={"layers": [7]})


@pytest.mark.parametrize("backend", ["nope", "CPU", "", None, 3])
def test_an_unavailable_backend(backend: Any) -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got"):
        CarveEngine(*family("llava"), preset=SHORT, backend=backend)


def test_arguments_of_another_kind_are_named_before_any_work() -> None:
    model, processor = family("llava")
    engine = CarveEngine(model, processor, preset=SHORT)
    for call in (lambda: engine(PHOTO, QUESTION, on_progress=3), lambda: engine([PHOTO], QUESTION, on_progress=3)):  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"^on_progress: expected a function or None, got int 3$"):
            call()
    with pytest.raises(TypeError, match=r"^rows: expected a list, got int 5$"):
        profile(model, processor, [Probe(PHOTO, QUESTION)], rows=5)  # type: ignore[arg-type]
    for inputs in (5, {"pixel_values": torch.zeros(1)}):
        with pytest.raises(TypeError, match=r"^inputs: expected the output of the processor, with input_ids, got "):
            layout_of(model, processor, inputs, [PHOTO])


def test_no_request_has_no_answer() -> None:
    stages: list[str] = []
    assert CarveEngine(*family("llava"), preset=SHORT).answer([], stages.append) == [] and stages == []


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (400, 9)])
def test_small_and_thin_images(name: str, size: tuple[int, int]) -> None:
    model, processor = family(name)
    result = CarveEngine(model, processor, preset=Preset.paper(max_new_tokens=2))(make_image(*size), QUESTION)
    assert result.saliency.shape == size[::-1] and min(result.refined.size) >= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_images_of_any_mode(mode: str) -> None:
    model, processor = family("llava")
    image = Image.new(mode, (50, 40))
    assert CarveEngine(model, processor, preset=Preset.paper(max_new_tokens=1))(image, QUESTION).image.mode == "RGB"


def test_bad_input_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    model, processor = family("llava")
    engine = CarveEngine(model, processor, preset=SHORT)
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(huge)
    before = state(model)
    ran: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    cases: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, "question: expected a string with at least one visible", (PHOTO, "  ")),
        (TypeError, "question: expected a string", (PHOTO, None)),
        (ValueError, "question|text", (PHOTO, "<image> what")),
        (ValueError, "image: cannot be used .expected at least one pixel, got 0 x 0", (Image.new("RGB", (0, 0)), "a")),
        (TypeError, "image: expected a path or a PIL image", (numpy.zeros((4, 4, 3)), QUESTION)),
        (ValueError, "image: .*broken.png cannot be read", (broken, QUESTION)),
        (ValueError, "image: .*missing.png is missing", (str(missing), QUESTION)),
        (ValueError, "image: .*huge.png is too large|20000 x 20000", (huge, QUESTION)),
        (ValueError, "prompt: expected a string with", (PHOTO, QUESTION, " ")),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            engine(*arguments)
    hook.remove()
    assert not ran and state(model) == before


def test_weights_of_layers_are_counted_at_once() -> None:
    model, processor = family("llava")
    with pytest.raises(ValueError, match=r"layer_weights: expected one for each of layers \[0\]"):
        CarveEngine(model, processor, preset={"layers": [0], "layer_weights": [1, 2]})
    preset = {"layers": [0], "steps": "t_full", "step_weights": [1, 2], "max_new_tokens": 5}
    assert CarveEngine(model, processor, preset=preset)(PHOTO, QUESTION).saliency.shape == (160, 240)


def test_weights_belong_to_the_layers_as_they_were_named() -> None:
    model, processor = family("llava")
    named, ordered = (
        CarveEngine(model, processor, preset={"layers": layers, "layer_weights": weights, "max_new_tokens": 2})
        for layers, weights in (([3, 0], [9, 1]), ([0, 3], [1, 9]))
    )
    first, second = named(PHOTO, QUESTION), ordered(PHOTO, QUESTION)
    assert torch.equal(first.saliency, second.saliency) and first.preset.layer_weights == (9, 1)


def test_max_new_tokens_0() -> None:
    with pytest.raises(ValueError, match="max_new_tokens: expected an integer of at least 1, got int 0"):
        Preset.paper(max_new_tokens=0)


def test_a_model_that_computes_nan_is_named() -> None:
    model, processor = tiny_llava()
    with torch.no_grad():
        model.model.language_model.layers[3].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)


def test_a_model_that_drops_numbers_at_random_is_refused() -> None:
    model, processor = tiny_llava()
    engine = CarveEngine(model, processor, preset=SHORT)
    expected = engine(PHOTO, QUESTION)
    attention, tower = model.model.language_model.layers[1].self_attn, model.model.vision_tower
    # Without dropout, training mode changes nothing.
    model.train()
    assert engine(PHOTO, QUESTION).answer_ids == expected.answer_ids
    attention.attention_dropout = 0.2
    with pytest.raises(ValueError, match=r"^model: .*layers\.1\.self_attn"):
        engine(PHOTO, QUESTION)
    with pytest.raises(ValueError, match=r"^model: "):
        profile(model, processor, [Probe(PHOTO, QUESTION)], preset=SHORT)
    model.eval()
    attention.attention_dropout = 0.0
    tower.dropped = torch.nn.Dropout(0.1).train()
    with pytest.raises(ValueError, match=r"^model: .*vision_tower\.dropped"):
        engine(PHOTO, QUESTION)
