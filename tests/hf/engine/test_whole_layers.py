"""Layers past their windows leave a question alone: planted maps, and an engine on a model with windows."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from carve_kernels import AttentionMaps, CarveEngine, Preset
from carve_kernels.hf.engine.whole_layers import whole_layers
from tests.support.tiny_models import make_image, tiny_llava

LAYERS, TOKENS = (4, 5, 6), 6
PHOTO, QUESTION = make_image(240, 160, 1), "what digit is red"


def planted(steps: int, lost: dict[int, int], gone: dict[int, int] | None = None) -> AttentionMaps:
    """Maps of one row: layer `l` loses a token from step lost[l] on, and all of them from step gone[l] on."""
    values = torch.rand(1, len(LAYERS), steps, 1, TOKENS, generator=torch.Generator().manual_seed(steps)) + 0.1
    missing, valid = torch.zeros(values.shape, dtype=torch.bool), torch.ones(values.shape[:-1], dtype=torch.bool)
    for layer, step in lost.items():
        missing[0, LAYERS.index(layer), step:, 0, 0] = True
    for layer, step in (gone or {}).items():
        valid[0, LAYERS.index(layer), step:] = False
    missing &= valid[..., None]
    values[missing | ~valid[..., None]] = 0.0
    tokens = torch.arange(TOKENS, dtype=torch.int32)[None]
    entropy = torch.zeros(valid.shape)
    return AttentionMaps(
        values, values.sum(-1), entropy, valid, LAYERS, tuple(range(steps)), tokens, "float32", None, missing
    )


@pytest.mark.parametrize(
    ("steps", "task", "general", "kept"),
    [
        ("t_end", planted(5, {4: 3}), planted(3, {}), (5, 6)),
        ("t_end", planted(5, {}), planted(3, {5: 2}, {6: 1}), (4,)),
        ("t_end", planted(3, {5: 3}), planted(3, {}), (4, 5, 6)),
        ("t_start", planted(5, {4: 3}), planted(3, {6: 1}), (4, 5, 6)),
        ("t_start", planted(5, {4: 0}), planted(3, {6: 1}), (5, 6)),
        # Steps are paired up to the shorter answer.
        ("t_full", planted(5, {4: 3, 5: 2}), planted(3, {}), (4, 6)),
        ("t_full", planted(5, {}, {6: 4}), planted(5, {}), (4, 5)),
    ],
)
def test_layers_that_see_the_whole_image_are_kept(
    steps: str, task: AttentionMaps, general: AttentionMaps, kept: tuple[int, ...]
) -> None:
    found = whole_layers(task, general, Preset.paper(steps=steps, layer_weights=(3, 5, 7)))
    assert found.layers == kept and found.left_out == tuple(layer for layer in LAYERS if layer not in kept)
    assert found.weights == tuple({4: 3, 5: 5, 6: 7}[layer] for layer in kept)
    index = [LAYERS.index(layer) for layer in kept]
    assert torch.equal(found.task, task.values[0, index, :, 0]) and torch.equal(
        found.general, general.values[0, index, :, 0]
    )


def test_steps_beyond_the_weights_are_not_read() -> None:
    task = planted(5, {4: 3, 5: 2})
    assert whole_layers(task, task, Preset.paper(steps="t_full", step_weights=(1, 2, 3))).layers == (4, 6)
    assert whole_layers(task, task, Preset.paper(steps="t_full", step_weights=(1, 2))).layers == (4, 5, 6)


def test_a_question_fails_only_if_no_layer_is_left() -> None:
    with pytest.raises(ValueError, match=r"layers: expected a layer that sees the whole image at .*t_end.*\[4, 5, 6\]"):
        whole_layers(planted(4, {4: 3, 5: 1}), planted(4, {6: 2}), Preset.paper())


@functools.cache
def windowed() -> tuple[Any, Any]:
    """A LLaVA whose text model has windows of 60 tokens in every other layer; the image has 36, the prompt about 55."""
    kinds = ["sliding_attention", "full_attention"] * 2
    language = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 60, "layer_types": kinds}
    model, processor = tiny_llava(language=language)
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.mark.parametrize("sequential", [False, True])
def test_an_engine_reads_the_layers_that_see_the_image(
    sequential: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = windowed()
    if sequential:
        monkeypatch.setattr("carve_kernels.hf.decoding.sequential_reason", lambda _model: "a test")
    preset = Preset.paper(layers="all", max_new_tokens=40, layer_weights=(1, 2, 3, 4))
    with caplog.at_level(logging.INFO, "carve_kernels"):
        result = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, QUESTION)
    assert result.layers_left_out == (0, 2) and list(result.entropy) == [1, 3]
    assert "layers [0, 2] do not see the whole image at t_end: left out" in caplog.text
    assert result.task.last_step(0) == 39 and result.task.whole(0)[1].all() and not result.task.whole(0)[0, 39]
    only = replace(preset, layers=(1, 3), layer_weights=(2, 4))
    expected = CarveEngine(model, processor, preset=only, memory=False)(PHOTO, QUESTION)
    assert torch.equal(result.saliency, expected.saliency) and expected.layers_left_out == ()
    assert result.refined_ids == expected.refined_ids
    with pytest.raises(ValueError, match=r"layers: expected a layer that sees the whole image .*\[0, 2\]"):
        CarveEngine(model, processor, preset=replace(preset, layers=(0, 2), layer_weights=None))(PHOTO, QUESTION)
