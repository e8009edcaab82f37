"""Sessions and the engine on Apple's MPS, emulated by another device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, capture_attention
from tests.support import tiny_models
from tests.support.mps import mps

FAMILIES = [tiny_models.tiny_llava, tiny_models.tiny_qwen2_5_vl]
TEXTS = ["what digit is red", "where is it"]


@pytest.fixture
def device() -> Iterator[torch.device]:
    with mps() as device:
        yield device


def move(model: Any, device: torch.device) -> Any:
    """`model.to`, which does not support this class of tensors."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(value.data.to(device), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.to(device)
    return model


def generate(model: Any, processor: Any, **options: Any) -> tuple[list[list[int]], Any]:
    images = [tiny_models.make_image(90, 60), tiny_models.make_image(60, 90, 2)]
    inputs = tiny_models.inputs_for(processor, images, TEXTS)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with capture_attention(model, layers=[1, 2], processor=processor) as session:
        answers = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return answers[:, inputs["input_ids"].shape[1] :].tolist(), session.maps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_captures_the_maps_of_a_cpu(device: torch.device, family: Callable[[], Any]) -> None:
    """Also of answers that end early: transformers detects the end a step late there, and runs one more forward."""
    model, processor = family()
    (first, second), _ = generate(model, processor)
    expected = [generate(model, processor, **options) for options in ({}, {"eos_token_id": [first[1], second[2]]})]
    move(model, device)
    for (answers, maps), options in zip(expected, ({}, {"eos_token_id": [first[1], second[2]]}), strict=True):
        new_ids, on_mps = generate(model, processor, **options)
        assert new_ids == answers and on_mps.steps == maps.steps and on_mps.values.device == device
        assert torch.equal(on_mps.valid.cpu(), maps.valid)
        torch.testing.assert_close(on_mps.values.cpu(), maps.values, rtol=1e-4, atol=1e-6 * float(maps.values.max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_answers_as_on_a_cpu(device: torch.device, family: Callable[[], Any]) -> None:
    model, processor = family()
    preset = {"layers": [1, 2], "max_new_tokens": 3}
    image = tiny_models.make_image(90, 60)
    expected = [CarveEngine(model, processor, preset=preset)(image, text) for text in TEXTS]
    engine = CarveEngine(move(model, device), processor, preset=preset)
    for text, reference in zip(TEXTS, expected, strict=True):
        result = engine(image, text)
        for name in ("answer_ids", "refined_ids", "box"):
            assert getattr(result, name) == getattr(reference, name)
