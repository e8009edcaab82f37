"""Every kind of model in the zoo: a session's maps under sdpa are eager's, or it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from carve_kernels import AttentionMaps, capture_attention
from carve_kernels.hf.model import attention_modules
from tests.support.zoo.kinds import Kind, build, kinds, set_text_attention

# What `make test` runs: deep features, linear layers, shared keys and windows, tiles, cross-attention, early fusion.
FEW = ("qwen3_vl", "qwen3_5", "gemma4_e", "internvl", "mllama", "fuyu")
NEW_TOKENS = 4
# Of a map's largest value: the noise of float32, where a wrong map is off by a tenth or more.
TOLERANCE = 1e-5

KINDS = [pytest.param(kind, id=name, marks=() if name in FEW else pytest.mark.slow) for name, kind in kinds().items()]


def left_out(kind: Kind) -> None:
    version = transformers.__version__
    if not kind.exists():
        pytest.skip(f"transformers {version} has no {kind.class_name}")
    if version == kind.broken_in:
        pytest.skip(f"{kind.class_name} itself fails with a picture in transformers {version}")


def test_the_zoo_is_as_large_as_the_version_allows() -> None:
    """A class that an earlier version had must not vanish from here in silence."""
    version = Version(transformers.__version__)
    expected = {name for name, kind in kinds().items() if Version(kind.since) <= version}
    found = {name for name, kind in kinds().items() if kind.exists()}
    assert len(kinds()) >= 64 and expected <= found, f"{len(found)} of {len(kinds())}, gone: {sorted(expected - found)}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_gives_eagers_maps(kind: Kind) -> None:
    left_out(kind)
    model, inputs, columns = build(kind.name)
    if kind.refused is not None:
        with pytest.raises((TypeError, ValueError), match=kind.refused):
            captured(model, inputs, columns, generate=False)
        return
    maps = captured(model, inputs, columns, generate=False)
    outputs = run(eager_twin(kind), inputs, output_attentions=True)
    assert maps.steps == (0,)
    equal(maps, [attentions_of(outputs)], inputs, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_gives_eagers_maps_at_every_step(kind: Kind) -> None:
    left_out(kind)
    model, inputs, columns = build(kind.name)
    if kind.generate_refused is not None:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=kind.generate_refused):
            captured(model, inputs, columns, generate=True)
        return
    maps = captured(model, inputs, columns, generate=True)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    outputs = run(eager_twin(kind).generate, inputs, output_attentions=True, **options)
    assert maps.steps == tuple(range(NEW_TOKENS))
    equal(maps, outputs.attentions, inputs, columns)


def captured(model: Any, inputs: dict[str, torch.Tensor], columns: list[int], generate: bool) -> AttentionMaps:
    layers = sorted(attention_modules(model))
    with capture_attention(model, layers=layers, tokens=columns) as session:
        if generate:
            run(model.generate, inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        else:
            run(model, inputs)
    return session.maps


def run(call: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return call(**inputs, **options)


def eager_twin(kind: Kind) -> Any:
    """The same weights in a model that has not run: the hooks of a first forward do not survive a copy."""
    twin = build(kind.name)[0]
    set_text_attention(twin, "eager")
    return twin


def attentions_of(outputs: Any) -> Any:
    """Where a model holds its language model's outputs apart, the attentions stand there."""
    return getattr(outputs, "language_model_outputs", outputs).attentions


def equal(maps: AttentionMaps, steps: Any, inputs: dict[str, torch.Tensor], columns: list[int]) -> None:
    """Hold captured maps against eager's attentions of each step; one whose keys have left the window is not valid."""
    for step, attentions in enumerate(steps):
        # Some models list the layers that have attention alone.
        complete = len(attentions) > max(maps.layers)
        for index, layer in enumerate(maps.layers):
            row = attentions[layer if complete else index][0, :, -1].float().mean(0)
            # A window's cache holds the newest keys alone.
            gone = inputs["input_ids"].shape[1] + step - len(row)
            expected = torch.tensor([float(row[column - gone]) if column >= gone else 0.0 for column in columns])
            top = float(expected.max())
            assert bool(maps.valid[0, index, step, 0]) == (top > 0), f"layer {layer} step {step}"
            off = float((maps.values[0, index, step, 0] - expected).abs().max())
            assert off <= TOLERANCE * top, f"layer {layer} step {step}: off by {off:.1e}, largest value {top:.1e}"
