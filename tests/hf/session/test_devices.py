"""Captured layers on several devices: the second one is emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf.model import decoder_layers, devices_of, text_backbone
from carve_kernels.hf.session.merging import merge_layers
from carve_kernels.maps import AttentionMaps
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


def planted(layers: tuple[int, ...], steps: int, missing: tuple[int, ...] | None) -> AttentionMaps:
    """Maps in which each number is that of the layer and the step; some layers lack the second of two tokens."""
    numbers = torch.tensor(layers)[:, None] * 100.0 + torch.arange(steps)
    scores = numbers[None, :, :, None]
    hidden = torch.zeros(1, len(layers), steps, 1, 2, dtype=torch.bool)
    for layer in missing or ():
        hidden[:, layers.index(layer), ..., 1] = True
    return AttentionMaps(
        torch.stack([scores, -scores], -1), scores + 0.25, scores + 0.5, scores >= 0, layers, tuple(range(steps)),
        torch.tensor([[3, 4]], dtype=torch.int32), "float32", None, None if missing is None else hidden,
    )  # fmt: skip


@pytest.mark.parametrize("gone", [(None, (3,)), ((0,), None), ((4,), (3,)), (None, None)])
def test_maps_of_two_devices_are_sorted_with_their_missing_tokens(gone: tuple[Any, Any]) -> None:
    merged = merge_layers([planted((0, 4), 3, gone[0]), planted((1, 3), 2, gone[1])])
    among = [layer for each in gone for layer in each or ()]
    expected = planted((0, 1, 3, 4), 2, tuple(among) if among else None)
    assert (merged.layers, merged.steps) == (expected.layers, expected.steps)
    for field in fields(AttentionMaps):
        found, wanted = getattr(merged, field.name), getattr(expected, field.name)
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted


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
