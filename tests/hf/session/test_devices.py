"""Captured layers on several devices: the second one is emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf.model import decoder_layers, devices_of, text_backbone
from carve_kernels.types import Capture
from tests.support.families import TEXTS, eager, exact, family, generate, inputs_of
from tests.support.mps import mps
from tests.support.offloading import dispatch
from tests.support.tiny_models import make_image, tiny_llava, tiny_qwen2_5_vl

BUILDERS: dict[str, Callable[[], Any]] = {"llava": tiny_llava, "qwen2_5_vl": tiny_qwen2_5_vl}
# Which layers are on the second device.
PLACES = {"last": (2, 3), "alternating": (0, 2)}


@pytest.fixture
def device() -> Iterator[torch.device]:
    with mps() as device:
        yield device


def spread(name: str, places: tuple[int, ...], device: torch.device) -> tuple[Any, Any]:
    """A model with some of its layers on a second device, and all the rest on the CPU."""
    model, processor = BUILDERS[name]()
    for number, layer in enumerate(decoder_layers(model)):
        dispatch(layer, device if number in places else torch.device("cpu"))
    dispatch(text_backbone(model).norm, torch.device("cpu"))
    assert [devices_of(layer) == {device} for layer in decoder_layers(model)] == [n in places for n in range(4)]
    return model, processor


@pytest.mark.parametrize(("name", "places"), [("llava", "alternating"), ("qwen2_5_vl", "last")])
def test_one_session_captures_them_all(device: torch.device, name: str, places: str) -> None:
    model, _ = spread(name, PLACES[places], device)
    called: list[tuple[int, int]] = []

    def on_layer(layer: int, step: int, capture: Capture) -> None:
        assert (capture.maps.device == device) == (layer in PLACES[places])
        called.append((layer, step))

    sequences, expected = eager(name, 3, "dynamic")
    truth = exact(name, 3)
    with capture_attention(model, layers="all", on_layer=on_layer if places == "alternating" else None) as session:
        output = generate(model, inputs_of(name, 3))
    maps = session.maps
    assert torch.equal(output.sequences, sequences)
    first = device if 0 in PLACES[places] else torch.device("cpu")
    assert maps.values.device == first and maps.layers == (0, 1, 2, 3) and maps.steps == tuple(range(5))
    found = maps.values[..., 0, :].cpu()
    bound = max(2 * float((expected - truth).abs().max()), 1e-6)
    assert float((found - truth).abs().max()) <= bound and bool(maps.valid.all())
    if places == "alternating":
        assert called == [(layer, step) for step in range(5) for layer in range(4)]


def test_layers_are_sorted_and_have_mass_and_entropy_of_their_own(device: torch.device) -> None:
    model, processor = spread("llava", (1, 3), device)
    same = family("llava")[0]
    options: Any = {"layers": [3, 0, 1], "rows": ("word", ["digit", "left", "hello"]), "processor": processor}
    with capture_attention(model, **options) as session, torch.no_grad():
        model(**inputs_of("llava", 3))
    with capture_attention(same, **options) as single, torch.no_grad():
        same(**inputs_of("llava", 3))
    found, expected = session.maps, single.maps
    assert found.layers == expected.layers == (0, 1, 3)
    for name in ("values", "mass", "entropy", "valid"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=1e-4, atol=1e-7)


def test_a_step_that_was_interrupted_between_two_devices_is_dropped(device: torch.device) -> None:
    model, _ = spread("llava", (2, 3), device)
    inputs = inputs_of("llava", 1)
    stop: list[int] = []

    def interrupt(*_call: Any) -> None:
        if stop:
            raise KeyboardInterrupt

    with capture_attention(model, layers="all") as session, torch.no_grad():
        output = model(**inputs, use_cache=True)
        token = output.logits[:, -1:].argmax(-1).cpu()
        output = model(input_ids=token, past_key_values=output.past_key_values)
        whole = session.maps
        stop.append(1)
        hook = decoder_layers(model)[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=token, past_key_values=output.past_key_values)
        hook.remove()
    assert session.maps.steps == whole.steps == (0, 1) and session.maps.layers == (0, 1, 2, 3)
    assert torch.equal(session.maps.values, whole.values)


def test_a_refused_forward_has_no_maps_on_any_device(device: torch.device) -> None:
    model, _ = spread("llava", (2, 3), device)
    inputs = inputs_of("llava", 1)
    with capture_attention(model, layers="all") as session, torch.no_grad():
        model(**inputs)
        assert session.maps.layers == (0, 1, 2, 3)
        with pytest.raises(ValueError, match=r"^input_ids: expected image tokens"):
            model(input_ids=torch.tensor([[20, 21, 22]]))
        with pytest.raises(RuntimeError, match=r"^maps: expected a forward"):
            _ = session.maps


def test_an_engine_answers_one_by_one(device: torch.device) -> None:
    name, preset = "llava", Preset.paper(layers=(1, 2), max_new_tokens=3)
    image = make_image(240, 160, 1)
    expected = CarveEngine(*family(name), preset=preset)(image, TEXTS[0])
    engine = CarveEngine(*spread(name, (2, 3), device), preset=preset)
    assert engine.sequential_reason == "its layers are not on one device"
    result = engine(image, TEXTS[0])
    for field in ("answer_ids", "refined_ids", "box"):
        assert getattr(result, field) == getattr(expected, field)
    torch.testing.assert_close(result.task.values.cpu(), expected.task.values, rtol=1e-4, atol=1e-7)
