"""Models whose prompts are looked at one by one: the reason is said, the answers and maps are the same."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf.decoding import sequential_reason
from tests.support.families import FAMILIES, family, generate, keeps_features, own_generate, state, watched
from tests.support.tiny_models import inputs_for, make_image, tiny_llava

QUESTION = "what digit is red"
PHOTO = make_image(240, 160, 1)
PRESETS = [
    Preset.paper(layers=(1, 2), max_new_tokens=5),
    Preset.paper(layers=(1, 2), steps="t_start", max_new_tokens=5),
    Preset.release(layers=(1, 2), max_new_tokens=5),
]


def own_attention(model: Any) -> None:
    AttentionInterface.register("carve_test_attention", sdpa_attention_forward)
    AttentionMaskInterface.register("carve_test_attention", sdpa_mask)
    model.set_attn_implementation({"text_config": "carve_test_attention"})


def chunked(model: Any) -> None:
    model.config.text_config.layer_types = ["full_attention", "chunked_attention"] * 2


def rotated(model: Any, **parameters: Any) -> None:
    model.config.text_config.rope_parameters = parameters


def configured(**settings: Any) -> Callable[[Any], None]:
    return lambda model: model.generation_config.update(**settings)


REASONS: list[tuple[str, Callable[[Any], None]]] = [
    ("it has its own generate", own_generate),
    ("'carve_test_attention' is not one of transformers'", own_attention),
    ("layers of type chunked_attention", chunked),
    ("attention is not causal", lambda model: setattr(model.config.text_config, "use_bidirectional_attention", True)),
    ("its rotation is 'dynamic'", lambda model: rotated(model, rope_type="dynamic")),
    ("its rotation is 'longrope'", lambda model: rotated(model, full_attention={"rope_type": "longrope"})),
    ("its cache is 'quantized'", configured(cache_implementation="quantized")),
    ("in training mode", lambda model: model.train()),
    ("compiled in place", lambda model: model.compile(backend="eager")),
    ("not on one device", lambda model: model.model.language_model.layers[2].to("meta")),
]


@pytest.mark.parametrize(("reason", "change"), REASONS, ids=[reason for reason, _ in REASONS])
def test_a_reason_is_given(reason: str, change: Callable[[Any], None]) -> None:
    model, processor = tiny_llava()
    assert (
        sequential_reason(model) is None and CarveEngine(model, processor, preset=PRESETS[0]).sequential_reason is None
    )
    change(model)
    assert reason in (sequential_reason(model) or "")


def test_an_open_session_is_a_reason() -> None:
    model, _ = family("llava")
    with capture_attention(model, layers=[1]):
        assert "session" in (sequential_reason(model) or "")
    assert sequential_reason(model) is None


@pytest.mark.parametrize("preset", PRESETS, ids=["t_end", "t_start", "release"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_request_that_was_answered_together_is_answered_again_alone(name: str, preset: Preset) -> None:
    model, processor = family(name)
    engine = CarveEngine(model, processor, preset=preset, memory=False)
    request = engine.request(PHOTO, QUESTION)
    engine.answer([request])
    with capture_attention(model, layers=[1]):
        (fresh,), (again,) = engine.answer([engine.request(PHOTO, QUESTION)]), engine.answer([request])
    assert again.answer_ids == fresh.answer_ids and again.refined_ids == fresh.refined_ids
    assert torch.equal(again.task.values, fresh.task.values) and torch.equal(again.mask, fresh.mask)


def test_an_image_that_is_kept_whole_is_asked_about_again_alone() -> None:
    model, processor = family("qwen2_5_vl")
    # The question is the general instruction: the ratio is flat, but for the weight of lam.
    preset = Preset.paper(layers=(1,), max_new_tokens=4, lam=0.0)
    engine = CarveEngine(model, processor, preset=preset, memory=False)
    request = engine.request(PHOTO, preset.general_prompt)
    (expected,) = engine.answer([request])
    unasked = CarveEngine(model, processor, preset=preset, memory=False, plain=False)
    with capture_attention(model, layers=[1]):
        (again,) = unasked.answer([request])
    assert again.reason is not None and again.refined_ids == expected.refined_ids


def test_a_generate_of_another_thread_beside_it() -> None:
    model, processor = tiny_llava()
    engine = CarveEngine(model, processor, preset=PRESETS[0], memory=False)
    expected = engine(PHOTO, QUESTION)
    inputs = inputs_for(processor, [PHOTO], [QUESTION])
    ids = generate(model, inputs).sequences
    found: list[Any] = []

    def beside() -> None:
        found.append(generate(model, inputs).sequences)

    def once(*_: Any) -> None:
        if not begun:
            begun.append(1)
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()

    begun: list[int] = []
    with watched(model.model.language_model.layers[1], before=once):
        assert engine(PHOTO, QUESTION).answer_ids == expected.answer_ids
    assert torch.equal(found[0], ids)


@pytest.mark.parametrize("preset", PRESETS, ids=["t_end", "t_start", "release"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_by_one_gives_the_same(name: str, preset: Preset, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = FAMILIES[name]()
    model.generation_config.repetition_penalty = 1.05
    together = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, QUESTION)
    before = state(model)
    own_generate(model)
    with caplog.at_level(logging.INFO, logger="carve_kernels"):
        alone = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, QUESTION)
    assert [record.message for record in caplog.records] == [
        "prompts are decoded one by one, since it has its own generate"
    ]
    assert together.answer_ids == alone.answer_ids and together.refined_ids == alone.refined_ids
    assert together.answer == alone.answer and together.box == alone.box
    for mine, expected in ((together.task, alone.task), (together.general, alone.general)):
        for part in ("values", "mass", "entropy"):
            values, truth = getattr(mine, part), getattr(expected, part)
            assert values.shape == truth.shape and float((values - truth).abs().max()) <= 1e-5 * float(truth.max())
        assert mine.steps == expected.steps and torch.equal(mine.valid, expected.valid)
    assert set(together.seconds) == set(alone.seconds)
    model.__class__ = type(model).__mro__[1]
    assert state(model)[2:] == before[2:]


def test_a_prompt_without_tree_decoding_is_decoded_sequentially(caplog: pytest.LogCaptureFixture) -> None:
    model, processor = family("llava")
    preset = Preset.paper(layers=(1,), rows=(30, 31), max_new_tokens=3)
    engine = CarveEngine(model, processor, preset=preset)
    with caplog.at_level(logging.INFO, logger="carve_kernels"), pytest.raises(ValueError, match="sees the whole image"):
        # Rows inside of the image do not see its end.
        engine(PHOTO, QUESTION)
    assert "one by one, since no text follows the image tokens" in caplog.text


def test_the_question_before_the_image_shares_the_tower_alone() -> None:
    model, processor = tiny_llava()
    engine = CarveEngine(model, processor, preset=PRESETS[0], memory=False)
    seen: list[int] = []
    with watched(model.model.vision_tower, after=lambda *_: seen.append(1)):
        result = engine(PHOTO, QUESTION, prompt=f"USER: {QUESTION} <image>\nASSISTANT:")
    assert len(seen) == 2 + (not keeps_features(model))
    own_generate(model)
    alone = engine(PHOTO, QUESTION, prompt=f"USER: {QUESTION} <image>\nASSISTANT:")
    assert result.answer_ids == alone.answer_ids and result.refined_ids == alone.refined_ids
    assert torch.allclose(result.task.values, alone.task.values, rtol=2e-4, atol=1e-7)
