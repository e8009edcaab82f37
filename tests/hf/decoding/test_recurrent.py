"""Hybrids in tree decoding: recurrent and convolution layers continue copies of the states of the prefix."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from carve_kernels import CarveEngine, Preset
from carve_kernels.hf.decoding import sequential_reason
from carve_kernels.hf.decoding.prompt_groups import Branch
from carve_kernels.hf.decoding.recurrent import recurrent_modules
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.image_inputs import moved
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.model import attention_modules
from tests.support.families import state
from tests.support.processors.kinds import pair
from tests.support.tiny_models import make_image, tiny_llava
from tests.support.zoo.kinds import build, kinds
from tests.support.zoo.prompts import QUESTIONS, alone, asking, counted_tokens, decode, group_of

HYBRIDS = ["qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl", "minicpmv4_6", "minicpmv4_7"]
WORDS = 5
PHOTO, QUESTION, OTHER = make_image(240, 160, 1), "what digit is red", "where is the square at the left of the image"


@functools.cache
def hybrid(name: str) -> tuple[Any, dict[str, torch.Tensor], list[int], tuple[int, ...]]:
    if not kinds()[name].exists():
        pytest.skip(f"this transformers has no {name}")
    model, inputs, columns = build(name)
    return model, inputs, columns, tuple(attention_modules(model))


@pytest.mark.parametrize("name", HYBRIDS)
def test_prompts_equal_their_own_generate_and_the_prefix_is_read_once(name: str) -> None:
    model, inputs, columns, layers = hybrid(name)
    assert sequential_reason(model) is None and len(recurrent_modules(model)) + len(layers) == 4
    before = state(model)
    group = group_of(inputs, columns, WORDS)
    with counted_tokens(model) as tokens:
        found = decode(model, layers, group)
    start = columns[-1] + 1
    suffixes = sum(1 + len(question) for question in QUESTIONS) + len(QUESTIONS) * (WORDS - 1)
    assert tokens == [start + suffixes] * 4 and state(model) == before
    for question, result in zip(QUESTIONS, found, strict=True):
        ids, maps = alone(model, inputs, columns, question, WORDS, layers)
        assert list(result.ids) == ids
        assert torch.allclose(result.maps.values, maps.values, rtol=1e-3, atol=1e-6)
        assert torch.equal(result.maps.seen, maps.seen)

    # The prefix again, for another prompt: only its own tokens are read, and the states are as they were.
    again = group_of(inputs, columns, WORDS)
    again.prefix, again.branches = group.prefix, again.branches[::-1]
    with counted_tokens(model) as tokens:
        second = decode(model, layers, again)
    assert tokens == [suffixes] * 4 and [result.ids for result in second] == [result.ids for result in found][::-1]
    assert torch.allclose(second[0].maps.values, found[2].maps.values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "qwen2_5_vl"])
def test_the_memory_of_a_prompt_is_that_of_its_cache(name: str, dtype: torch.dtype) -> None:
    model, inputs, _ = build(name)
    processor = pair(name)[1]
    engine = CarveEngine(model.to(dtype), processor, preset=Preset.paper(layers=tuple(attention_modules(model))[:1]))
    with torch.no_grad():
        cache = model(**moved(inputs, torch.device("cpu"), dtype), use_cache=True).past_key_values
    tokens = inputs["input_ids"].shape[1]
    keys = [each for layer in cache.layers for each in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    states = [
        state
        for layer in cache.layers
        for kind in ("conv_states", "recurrent_states")
        for state in getattr(layer, kind, {}).values()
    ]
    assert engine.bytes_per_token * tokens == sum(each.nbytes for each in keys if each is not None) > 0
    assert engine.bytes_per_prompt == sum(each.nbytes for each in states if each is not None)
    assert (engine.bytes_per_prompt > 0) is (name != "qwen2_5_vl")


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_maps_of_the_first_step_end_at_the_last_captured_layer(name: str) -> None:
    model, inputs, columns, layers = hybrid(name)
    group = group_of(inputs, columns, 0)
    with counted_tokens(model) as tokens:
        found = decode(model, layers[:1], group)
    assert [count > 0 for count in tokens] == [number <= layers[0] for number in range(4)]
    for question, result in zip(QUESTIONS, found, strict=True):
        _, maps = alone(model, inputs, columns, question, 1, layers[:1])
        assert torch.allclose(result.maps.values, maps.values, rtol=1e-3, atol=1e-6)
    # A prefix that few layers have read is read again where all are needed.
    longer = group_of(inputs, columns, WORDS)
    longer.prefix = group.prefix
    assert list(decode(model, layers, longer)[0].ids) == alone(model, inputs, columns, QUESTIONS[0], WORDS, layers)[0]


def test_two_images_in_one_forward_keep_their_states_separate() -> None:
    model, inputs, columns, layers = hybrid("qwen3_5")
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) + 0.5}
    found = decode(model, layers, group_of(inputs, columns, WORDS), group_of(other, columns, WORDS))
    for index, each in enumerate((inputs, other)):
        for question, result in zip(QUESTIONS, found[3 * index : 3 * index + 3], strict=True):
            assert list(result.ids) == alone(model, each, columns, question, WORDS, layers)[0]


def test_layers_that_do_not_continue_their_states_are_decoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid("qwen3_5")[0]
    module = type(recurrent_modules(model)[0])
    forward = module.forward

    def forgets(self: nn.Module, hidden_states: torch.Tensor, cache: Any = None, **options: Any) -> Any:
        return forward(self, hidden_states, cache=None, **options)

    forgets.__module__ = module.__module__
    monkeypatch.setattr(module, "forward", forgets)
    monkeypatch.setattr("carve_kernels.hf.decoding.foreign_code", lambda _model: None)
    assert sequential_reason(model) == f"its layer 0 ({module.__name__}) does not continue a copy of its states"

    def fails(self: nn.Module, hidden_states: torch.Tensor, cache: Any = None) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(module, "forward", fails)
    assert "the states of its layer 0 cannot be tried (RuntimeError: no kernel)" in str(sequential_reason(model))


@functools.cache
def llava() -> tuple[Any, Any]:
    """A LLaVA whose text model is an LFM2 of four layers, the last one a convolution."""
    kinds_of_layers = ["conv", "full_attention", "full_attention", "conv"]
    language = {"model_type": "lfm2", "layer_types": kinds_of_layers, "block_auto_adjust_ff_dim": False}
    model, processor = tiny_llava(language=language)
    model.generation_config.eos_token_id = None
    return model, processor


def greedy(images: list[Any], text: str) -> list[int]:
    model, processor = llava()
    ids: list[int] = greedy_generate(
        model, prepare(processor, images, build_prompt(processor, text, len(images))), WORDS
    ).tolist()
    return ids


@pytest.mark.parametrize("name", ["paper", "release"])
@pytest.mark.parametrize("memory", [False, None])
def test_an_engine_reads_each_image_once(name: str, memory: Any) -> None:
    model, processor = llava()
    preset = Preset.of({"preset": name, "layers": "all", "max_new_tokens": WORDS, "steps": "t_end"})
    engine = CarveEngine(model, processor, preset=preset, memory=memory)
    assert engine.sequential_reason is None and engine.layers == (1, 2)
    for question in (QUESTION, OTHER):
        result, asked = engine(PHOTO, question), question + preset.suffix
        images = [result.refined] if preset.images == "refined" else [PHOTO, result.refined]
        assert result.reason is None
        assert list(result.answer_ids) == greedy([PHOTO], asked) and list(result.refined_ids) == greedy(images, asked)
    with counted_tokens(model) as tokens:
        engine(PHOTO, "what")
    images = {("paper", False): 2, ("paper", None): 1, ("release", False): 2, ("release", None): 1}[name, memory]
    # An image has 36 tokens; the prompts and answers beside it fewer than 36 for each of the three.
    assert 36 * images <= tokens[3] < 36 * images + 3 * 36 + 36
    assert len(set(tokens)) == 1
    quick = CarveEngine(
        model, processor, preset=Preset.paper(layers=(1,), steps="t_start", max_new_tokens=WORDS), plain=False
    )
    assert quick(PHOTO, QUESTION).reason is None


def test_branches_of_a_group_share_no_states() -> None:
    """The same prompt twice, and once more after others."""
    model, inputs, columns, layers = hybrid("lfm2_vl")
    group = group_of(inputs, columns, WORDS)
    text = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
    group.branches = [Branch(asking(text, columns, QUESTIONS[index]), WORDS, "last") for index in (0, 0, 1, 0)]
    found = [result.ids for result in decode(model, layers, group)]
    assert found[0] == found[1] == found[3]
