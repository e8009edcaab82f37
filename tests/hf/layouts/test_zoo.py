"""Every kind of model in the zoo: a session's maps under sdpa equal eager's, or it refuses the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from carve_kernels import AttentionMaps, capture_attention
from carve_kernels.hf.model import attention_modules, image_token_positions
from tests.support.zoo.kinds import Kind, build, kinds, set_text_attention

# For `make test`: deep features, linear layers, shared keys and windows, tiles, cross-attention, early fusion.
FEW = ("qwen3_vl", "qwen3_5", "gemma4_e", "internvl", "mllama", "fuyu")
NEW_TOKENS = 4
# Relative to a map's maximum: float32 noise; a wrong map is off by a tenth or more.
TOLERANCE = 1e-5

KINDS = [pytest.param(kind, id=name, marks=() if name in FEW else pytest.mark.slow) for name, kind in kinds().items()]


def skip_unavailable(kind: Kind) -> None:
    version = transformers.__version__
    if not kind.exists():
        pytest.skip(f"transformers {version} has no {kind.class_name}")
    if version == kind.broken_in:
        pytest.skip(f"{kind.class_name} itself fails with an image in transformers {version}")


def test_the_zoo_is_as_large_as_the_version_allows() -> None:
    """A class of an earlier version must not vanish silently."""
    version = Version(transformers.__version__)
    expected = {name for name, kind in kinds().items() if Version(kind.since) <= version}
    existing = {name for name, kind in kinds().items() if kind.exists()}
    assert len(kinds()) >= 64 and expected <= existing, (
        f"{len(existing)} of {len(kinds())}, gone: {sorted(expected - existing)}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_a_forward_equal_eagers(kind: Kind) -> None:
    skip_unavailable(kind)
    model, inputs, columns = build(kind.name)
    if kind.refused is not None:
        with pytest.raises((TypeError, ValueError), match=kind.refused):
            captured(model, inputs, columns, generate=False)
        return
    maps = captured(model, inputs, columns, generate=False)
    outputs = run(eager_twin(kind), inputs, output_attentions=True)
    assert maps.steps == (0,)
    check_equal(maps, [attentions_of(outputs)], inputs, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_a_generation_equal_eagers(kind: Kind) -> None:
    skip_unavailable(kind)
    model, inputs, columns = build(kind.name)
    if kind.generate_refused is not None:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=kind.generate_refused):
            captured(model, inputs, columns, generate=True)
        return
    maps = captured(model, inputs, columns, generate=True)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    outputs = run(eager_twin(kind).generate, inputs, output_attentions=True, **options)
    assert maps.steps == tuple(range(NEW_TOKENS))
    check_equal(maps, outputs.attentions, inputs, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_without_tokens_the_image_tokens_are_captured(kind: Kind) -> None:
    """They are the true columns."""
    if not kind.exists():
        pytest.skip(f"transformers {transformers.__version__} has no {kind.class_name}")
    model, inputs, columns = build(kind.name)
    (found,) = image_token_positions(model, inputs["input_ids"])
    assert found.tolist() == columns


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
    """The same weights in a new model: hooks of a first forward do not survive a copy."""
    twin = build(kind.name)[0]
    set_text_attention(twin, "eager")
    return twin


def attentions_of(outputs: Any) -> Any:
    """The attentions, which some models return in their language model's outputs."""
    return getattr(outputs, "language_model_outputs", outputs).attentions


def check_equal(maps: AttentionMaps, steps: Any, inputs: dict[str, torch.Tensor], columns: list[int]) -> None:
    """Compare captured maps with eager's attentions of each step; maps outside of the window are not valid."""
    for step, attentions in enumerate(steps):
        # Some models return only layers with attention.
        complete = len(attentions) > max(maps.layers)
        for index, layer in enumerate(maps.layers):
            row = attentions[layer if complete else index][0, :, -1].float().mean(0)
            # A sliding cache has only the newest keys.
            gone = inputs["input_ids"].shape[1] + step - len(row)
            expected = torch.tensor([float(row[column - gone]) if column >= gone else 0.0 for column in columns])
            top = float(expected.max())
            assert bool(maps.valid[0, index, step, 0]) == (top > 0), f"layer {layer} step {step}"
            off = float((maps.values[0, index, step, 0] - expected).abs().max())
            assert off <= TOLERANCE * top, f"layer {layer} step {step}: off by {off:.1e}, largest value {top:.1e}"
