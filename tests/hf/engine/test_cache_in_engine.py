"""The engine with a memory: what it remembers gives what it would compute, and only where it may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset
from carve_kernels.hf.engine.cache import Memory
from carve_kernels.hf.engine.result import CarveResult
from tests.support.families import family, watched
from tests.support.tiny_models import make_image, tiny_llava

PHOTO = make_image(240, 160, 1)
QUESTION = "what digit is red"
OTHER = "where is the square at the left of the image"
SHORT = Preset.paper(layers=(1, 2), max_new_tokens=4)


class Counting(Memory):
    """A memory that counts what was found and what had to be computed."""

    def __init__(self, *args: Any, **bounds: Any) -> None:
        super().__init__(*args, **bounds)
        self.found = self.computed = 0

    def maps(self, key: Any) -> Any:
        found = super().maps(key)
        self.found += found is not None
        return found

    def keep_maps(self, key: Any, maps: Any) -> None:
        self.computed += 1
        super().keep_maps(key, maps)


def check(found: CarveResult, expected: CarveResult) -> None:
    assert found.answer_ids == expected.answer_ids and found.refined_ids == expected.refined_ids
    assert found.general.steps == expected.general.steps and found.general.layers == expected.general.layers
    for mine, theirs in ((found.general, expected.general), (found.task, expected.task)):
        assert torch.allclose(mine.values, theirs.values, rtol=1e-4, atol=1e-8)
    assert (found.mask != expected.mask).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "preset",
    [
        SHORT,
        Preset.paper(layers=(1, 2), steps="t_full", max_new_tokens=4),
        Preset.paper(layers=(0,), steps="t_start", max_new_tokens=4),
        Preset.release(layers=(1, 2), max_new_tokens=4),
    ],
)
def test_a_folder_spares_another_process_the_general_instruction(tmp_path: Path, name: str, preset: Preset) -> None:
    model, processor = family(name)
    CarveEngine(model, processor, preset=preset, memory=tmp_path)(PHOTO, QUESTION)
    memory = Counting(tmp_path)
    remembering = CarveEngine(model, processor, preset=preset, memory=memory)
    for question in (OTHER, QUESTION, OTHER):
        check(
            remembering(PHOTO.copy(), question),
            CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, question),
        )
    assert (memory.found, memory.computed) == (3, 0) and len(list(tmp_path.iterdir())) == 1
    assert memory.held().prefixes == 1 and memory.held().prefix_bytes > 0


def train(model: Any) -> None:
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: ({}, make_image(240, 160, 2)),
        lambda model: ({"preset": Preset.paper(layers=(1, 3), max_new_tokens=4)}, PHOTO),
        lambda model: ({"preset": Preset.paper(layers=(1, 2), max_new_tokens=5)}, PHOTO),
        lambda model: ({"preset": Preset.paper(layers=(1, 2), max_new_tokens=4, general_prompt="Look.")}, PHOTO),
        lambda model: ({"preset": Preset.paper(layers=(1, 2), max_new_tokens=4, rows=2)}, PHOTO),
        lambda model: train(model) or ({}, PHOTO),
        lambda model: setattr(model.generation_config, "repetition_penalty", 1.5) or ({}, PHOTO),
        lambda model: model.set_attn_implementation({"text_config": "eager"}) or ({}, PHOTO),
    ],
)
def test_another_map_is_computed_again(change: Callable[[Any], tuple[dict[str, Any], Any]]) -> None:
    model, processor = tiny_llava()
    memory = Counting()
    CarveEngine(model, processor, preset=SHORT, memory=memory)(PHOTO, QUESTION)
    options, image = change(model)
    options = {"preset": SHORT, **options}
    found = CarveEngine(model, processor, memory=memory, **options)(image, QUESTION)
    assert (memory.found, memory.computed) == (0, 2)
    check(found, CarveEngine(model, processor, memory=False, **options)(image, QUESTION))


def test_results_do_not_reach_into_the_memory() -> None:
    model, processor = family("llava")
    engine = CarveEngine(model, processor, preset=SHORT)
    expected = CarveEngine(model, processor, preset=SHORT, memory=False)(PHOTO, OTHER)
    for _ in range(2):
        spoiled = engine(PHOTO, QUESTION)
        for maps in (spoiled.general, spoiled.task):
            maps.values.fill_(7.0)
            maps.tokens.fill_(0)
    check(engine(PHOTO, OTHER), expected)


def test_small_bounds_cost_time_and_nothing_else() -> None:
    model, processor = family("qwen2_5_vl")
    memory = Counting(maps_bytes=0, prefix_bytes=1000)
    engine = CarveEngine(model, processor, preset=SHORT, memory=memory)
    alone = CarveEngine(model, processor, preset=SHORT, memory=False)
    for question in (QUESTION, OTHER):
        check(engine(PHOTO, question), alone(PHOTO, question))
    assert memory.computed == 2 and sum(memory.held()) == 0


def test_a_failure_in_the_middle_spoils_no_prefix() -> None:
    model, processor = family("qwen2_5_vl")
    engine = CarveEngine(model, processor, preset=SHORT)
    engine(PHOTO, QUESTION)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the middle")

    layer = model.model.language_model.layers[2]
    with pytest.raises(RuntimeError, match="in the middle"), watched(layer, before=fail):
        engine(PHOTO, OTHER)
    check(engine(PHOTO, OTHER), CarveEngine(model, processor, preset=SHORT, memory=False)(PHOTO, OTHER))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_prefix_takes_no_more_than_its_tokens(name: str) -> None:
    model, processor = family(name)
    preset = Preset.release(layers=(1, 2), max_new_tokens=4)
    engine = CarveEngine(model, processor, preset=preset)
    engine(PHOTO, QUESTION)
    (prefix,) = (entry for entry, _ in engine.memory._prefixes._entries.values())
    assert engine.memory.held().prefix_bytes <= len(prefix) * engine.bytes_per_token * 5 // 4
    check(engine(PHOTO, OTHER), CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, OTHER))


def test_a_tokenizer_that_splits_otherwise_asks_again() -> None:
    from tokenizers import processors

    model, processor = tiny_llava()
    engine = CarveEngine(model, processor, preset=SHORT)
    engine(PHOTO, QUESTION)
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A hello", special_tokens=[("hello", 70)])
    expected = CarveEngine(model, processor, preset=SHORT, memory=False)(PHOTO, OTHER)
    check(engine(PHOTO, OTHER), expected)
    assert torch.equal(engine(PHOTO, OTHER).general.tokens, expected.general.tokens)


def test_a_prefix_that_was_put_away_in_inference_mode_is_written_to_again(tmp_path: Path) -> None:
    model, processor = family("llava")
    long = Preset.paper(layers=(1, 2), max_new_tokens=40)
    CarveEngine(model, processor, preset=long, memory=tmp_path)(make_image(60, 60), "hello")
    engine = CarveEngine(model, processor, preset=long, memory=tmp_path)
    with torch.inference_mode():
        engine(make_image(60, 60), OTHER * 2)
        result = engine(make_image(60, 60), "hello")
    expected = CarveEngine(model, processor, preset=long, memory=False)(make_image(60, 60), "hello")
    assert result.answer_ids == expected.answer_ids
