"""Sessions with `heads="each"`: every head's maps equal eager's, at every step, and the maps stay their means."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carve_kernels import Capture, capture_attention
from tests.support.families import STEPS, eager, family, generate, in_eager, inputs_of, visual
from tests.support.windowed_models import model_of
from tests.support.zoo.kinds import build, set_text_attention


def captured(model: Any, run: Any, **options: Any) -> tuple[dict[tuple[int, int], Capture], Any]:
    """What `on_layer` gets in a session, by layer and step, and the session's maps."""
    heads: dict[tuple[int, int], Capture] = {}

    def keep(layer: int, step: int, capture: Capture) -> None:
        heads[layer, step] = capture

    with capture_attention(model, on_layer=keep, heads="each", **{"layers": "all", **options}) as session:
        run()
    return heads, session.maps


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_maps_of_each_head_equal_eagers(using: Any, name: str, implementation: str) -> None:
    """Three prompts of a padded batch, grouped heads, the prefill and every decode step."""
    model, inputs = family(name)[0], inputs_of(name, 3)
    using(model, implementation)
    outputs: list[Any] = []
    heads, maps = captured(model, lambda: outputs.append(generate(model, inputs)))
    assert torch.equal(outputs[0].sequences, eager(name, 3, "dynamic")[0])
    expected = generate(in_eager(name), inputs, output_attentions=True).attentions
    columns = visual(model, inputs)
    assert sorted(heads) == [(layer, step) for layer in range(4) for step in range(STEPS)]
    for (layer, step), found in heads.items():
        truth = expected[step][layer]
        assert found.maps.shape == (3, truth.shape[1], 1, maps.values.shape[-1])
        for row, places in enumerate(columns):
            of_eager = truth[row, :, -1, places]
            assert float(of_eager.std(0).mean()) > 0.02 * float(of_eager.mean())
            torch.testing.assert_close(found.maps[row, :, 0, : len(places)], of_eager, rtol=1e-4, atol=1e-8)
            assert not found.maps[row, :, 0, len(places) :].any()
        torch.testing.assert_close(found.maps.mean(1), maps.values[:, layer, step], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.mass, maps.mass[:, layer, step])
        torch.testing.assert_close(found.entropy, maps.entropy[:, layer, step])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss", "mistral"])
def test_softcaps_sinks_and_windows(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(5, 90, (2, 30), generator=torch.Generator().manual_seed(1))
    columns, rows = list(range(6, 19)), [17, 24, 29]

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    heads, maps = captured(model, run, rows=rows, tokens=columns)
    set_text_attention(model, "eager")
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    for layer, truth in enumerate(attentions):
        expected = truth[:, :, rows][..., columns]
        torch.testing.assert_close(heads[layer, 0].maps, expected, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(heads[layer, 0].maps.mean(1), maps.values[:, layer, 0], rtol=1e-6, atol=1e-9)


def test_the_maps_of_each_head_have_gradients() -> None:
    model, inputs, columns = build("qwen2_5_vl")
    pixels = inputs["pixel_values"].clone().requires_grad_()
    heads, maps = captured(model, lambda: model(**{**inputs, "pixel_values": pixels}, use_cache=False), grad=True)
    found = torch.autograd.grad(heads[2, 0].maps[0, 1].square().sum(), pixels, retain_graph=True)[0]
    of_mean = torch.autograd.grad(maps.values[0, 2].square().sum(), pixels)[0]
    set_text_attention(model, "eager")
    truth = model(**{**inputs, "pixel_values": pixels}, use_cache=False, output_attentions=True).attentions[2]
    row = truth[0, :, -1:, columns]
    for gradient, of_eager in ((found, row[1]), (of_mean, row.mean(0))):
        expected = torch.autograd.grad(of_eager.square().sum(), pixels, retain_graph=True)[0]
        assert float((gradient - expected).norm()) <= 2e-4 * float(expected.norm()) > 0


def test_behind_dropped_tokens() -> None:
    """The function that gets the maps of each head drops half of the tokens: maps are those without `heads`."""
    model, inputs = family("qwen2_5_vl")[0], inputs_of("qwen2_5_vl", 1)
    columns = visual(model, inputs)[0]
    maps: list[Any] = []
    heads: dict[tuple[int, int], Capture] = {}

    def drop(layer: int, step: int, capture: Capture) -> Any:
        heads[layer, step] = capture
        return columns[::2] if (layer, step) == (1, 0) else None

    for kind in ("mean", "each"):
        with capture_attention(model, layers="all", on_layer=drop, heads=kind) as session:
            generate(model, inputs, steps=3)
        maps.append(session.maps)
    assert maps[0].missing is not None and torch.equal(maps[0].missing, maps[1].missing)
    torch.testing.assert_close(maps[1].values, maps[0].values, rtol=1e-6, atol=1e-9)
    for (layer, step), capture in heads.items():
        torch.testing.assert_close(capture.maps.mean(1), maps[0].values[:, layer, step], rtol=1e-6, atol=1e-9)


def test_the_mean_over_rows_is_of_the_maps_only() -> None:
    """A question's rows reach the function one by one, as they do without `heads`."""
    model, processor = family("llava")
    heads, maps = captured(
        model, lambda: generate(model, inputs_of("llava", 1), steps=1), rows="question", processor=processor
    )
    assert heads[0, 0].maps.shape[2] > 2
    torch.testing.assert_close(heads[0, 0].maps.mean((1, 2)), maps.values[:, 0, 0, 0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("heads: expected one of 'mean', 'each', got str 'all'", {"heads": "all"}),
        ("on_layer: expected a function beside heads='each'", {"heads": "each"}),
        ("fused: expected False beside heads='each'", {"heads": "each", "on_layer": print, "fused": True}),
    ],
)
def test_refused_at_once(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        capture_attention(family("llava")[0], layers=[0], **options)
