"""What stands around a question: modes of torch, settings of generate, wrappers, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset
from tests.support.families import FAMILIES, family, greedy, own_generate, state
from tests.support.tiny_models import make_image

QUESTION = "what digit is red"
SHORT = Preset.paper(max_new_tokens=6)
PHOTO = make_image(240, 160, 1)


@pytest.mark.parametrize("first", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_a_question_in_another_mode_than_the_last_one(first: Any) -> None:
    engine = CarveEngine(*family("llava"), preset=SHORT)
    expected = engine(PHOTO, QUESTION)
    fresh = CarveEngine(*family("llava"), preset=SHORT)
    with first():
        fresh(PHOTO, QUESTION)
    result = fresh(PHOTO, QUESTION)
    assert result.answer_ids == expected.answer_ids and torch.equal(result.mask, expected.mask)
    with first():
        assert len(fresh(PHOTO, "hello").answer_ids) > 0
        # Long enough to be attended to as a whole.
        assert len(fresh(PHOTO, QUESTION * 8).answer_ids) > 0
        assert len(fresh(PHOTO, "what").answer_ids) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    model, processor = family("llava")
    expected = CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    torch.set_default_dtype(dtype)
    try:
        result = CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.task.values.dtype == torch.float32 and result.answer_ids == expected.answer_ids
    assert torch.allclose(result.task.values, expected.task.values, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("setting", ["prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_options_with_the_same_output(name: str, setting: str) -> None:
    expected = greedy(name, [PHOTO], QUESTION, SHORT)
    model, processor = FAMILIES[name]()
    setattr(model.generation_config, setting, 3)
    engine = CarveEngine(model, processor, preset=SHORT)
    assert engine.sequential_reason is None and list(engine(PHOTO, QUESTION).answer_ids) == expected


@pytest.mark.parametrize(
    ("setting", "value"), [("guidance_scale", 1.5), ("penalty_alpha", 0.6), ("dola_layers", "low")]
)
def test_words_that_are_not_greedy_are_refused(setting: str, value: Any) -> None:
    model, processor = FAMILIES["llava"]()
    setattr(model.generation_config, setting, value)
    before = state(model)
    with pytest.raises(ValueError, match=f"model: its generation config has {setting}="):
        CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    assert state(model) == before


@pytest.mark.parametrize("setting", ["prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size"])
def test_options_with_the_same_output_sequentially(setting: str) -> None:
    expected = greedy("llava", [PHOTO], QUESTION, SHORT)
    model, processor = FAMILIES["llava"]()
    setattr(model.generation_config, setting, 3)
    own_generate(model)
    engine = CarveEngine(model, processor, preset=SHORT)
    assert engine.sequential_reason is not None and list(engine(PHOTO, QUESTION).answer_ids) == expected
    assert getattr(model.generation_config, setting) == 3


def test_a_wrapper_that_does_not_generate() -> None:
    model, processor = FAMILIES["llava"]()
    expected = CarveEngine(model, processor, preset=SHORT)(PHOTO, QUESTION)
    own_generate(model)
    engine = CarveEngine(torch.nn.DataParallel(model), processor, preset=SHORT)
    assert engine.sequential_reason == "it has its own generate"
    assert engine(PHOTO, QUESTION).refined_ids == expected.refined_ids


def test_threads_wait_for_each_other() -> None:
    model, processor = family("qwen2_5_vl")
    images = [make_image(200, 120 + 28 * seed, seed) for seed in range(3)]
    engine = CarveEngine(model, processor, preset=SHORT)
    expected = [engine(image, QUESTION) for image in images]
    model.model.rope_deltas = torch.tensor([[-77]])
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda image: CarveEngine(model, processor, preset=SHORT)(image, QUESTION), images * 2))
    for result, alone in zip(found, expected * 2, strict=True):
        assert result.answer_ids == alone.answer_ids and result.refined_ids == alone.refined_ids
    assert model.model.rope_deltas.tolist() == [[-77]]


def test_a_question_within_a_question() -> None:
    engine = CarveEngine(*family("llava"), preset=SHORT)
    expected, inner = engine(PHOTO, QUESTION), []
    result = engine(PHOTO, QUESTION, on_progress=lambda *_: inner.append(engine(make_image(90, 60), "hello")))
    assert result.refined_ids == expected.refined_ids and len({each.answer_ids for each in inner}) == 1
