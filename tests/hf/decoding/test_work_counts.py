"""What an answer costs, counted inside the model: images in the tower, tokens in the layers, rows captured."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from carve_kernels import CarveEngine, Preset
from carve_kernels.hf.decoding.prefix_cache import PrefixCache, common_length
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.model import decoder_layers
from tests.support.families import FAMILIES, family, keeps_features, watched
from tests.support.tiny_models import make_image

QUESTION = "what digit is red"
OTHER = "where is the square at the left of the image"
PHOTO = make_image(240, 160, 1)
WORDS = 5


@dataclass
class Work:
    """Counts of one call: runs of the tower, tokens by layer, rows of norm and head, (layers, rows) by capture."""

    tower: int = 0
    tokens: list[int] = field(default_factory=list)
    norm: int = 0
    head: int = 0
    captures: list[tuple[int, int]] = field(default_factory=list)


class _Captures(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.carve_kernels.capture_layers.default:
            self.work.captures.append((len(args[0]), args[0][0].shape[2]))
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(model: Any) -> Iterator[Work]:
    work = Work(tokens=[0] * len(decoder_layers(model)))
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower

    def towers(_args: Any, _kwargs: Any) -> None:
        work.tower += 1

    def layer(number: int) -> Any:
        def count(args: Any, _kwargs: Any) -> None:
            work.tokens[number] += args[0].shape[1]

        return count

    def norm(args: Any, _kwargs: Any) -> None:
        work.norm += args[0].shape[1]

    def head(args: Any, _kwargs: Any) -> None:
        work.head += args[0].shape[1]

    with ExitStack() as stack:
        stack.enter_context(watched(tower, after=towers))
        for number, each in enumerate(decoder_layers(model)):
            stack.enter_context(watched(each, before=layer(number)))
        stack.enter_context(watched(model.model.language_model.norm, after=norm))
        stack.enter_context(watched(model.lm_head, after=head))
        stack.enter_context(_Captures(work))
        yield work


def ids_of(name: str, images: list[Any], text: str, preset: Preset) -> torch.Tensor:
    processor = family(name)[1]
    inputs = prepare(processor, images, build_prompt(processor, text, len(images)), None, preset.max_pixels)
    return inputs["input_ids"][0]


def endless(name: str) -> tuple[Any, Any]:
    """A model whose answers are as long as they may be."""
    model, processor = FAMILIES[name]()
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in FAMILIES), ("qwen2_5_vl", "eager")])
def test_each_image_and_each_token_once(name: str, attention: str) -> None:
    model, processor = endless(name)
    model.set_attn_implementation({"text_config": attention})
    preset = Preset.paper(layers=(1, 2), max_new_tokens=WORDS)
    with counted(model) as work:
        result = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, QUESTION)
    task, general = ids_of(name, [PHOTO], QUESTION, preset), ids_of(name, [PHOTO], preset.general_prompt, preset)
    last = ids_of(name, [result.refined], QUESTION, preset)
    shared = common_length(task, general)
    assert result.reason is None and shared > int((task == model.config.image_token_id).nonzero()[-1])
    assert work.tower == 2
    first = shared + (len(task) - shared) + (len(general) - shared) + 2 * (WORDS - 1)
    assert work.tokens == [first + len(last) + WORDS - 1] * 4
    assert work.head == 3 * WORDS
    # One capture call a step, for both prompts and both layers.
    assert work.captures == [(2, 2)] * WORDS


@pytest.mark.parametrize("name", FAMILIES)
def test_a_last_question_that_shows_the_original_again_reads_the_refined_image_alone(name: str) -> None:
    model, processor = endless(name)
    preset = Preset.release(layers=(1, 2), max_new_tokens=WORDS)
    with counted(model) as work:
        result = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, QUESTION)
    asked = QUESTION + preset.suffix
    task = ids_of(name, [PHOTO], asked, preset)
    general = ids_of(name, [PHOTO], preset.general_prompt + preset.suffix, preset)
    last = ids_of(name, [PHOTO, result.refined], asked, preset)
    first = common_length(task, general)
    assert result.reason is None and work.tower == 2
    once = first + (len(task) - first) + (len(general) - first) + 2 * (WORDS - 1)
    again = min(first, common_length(task, last))
    assert work.tokens == [once + len(last) - again + WORDS - 1] * 4


@pytest.mark.parametrize("images", ["refined", "original+refined"])
def test_an_image_that_is_kept_whole_is_not_seen_twice(images: str) -> None:
    model, processor = endless("llava")
    # The question is the general instruction: the ratio is flat, but for the weight of lam.
    preset = Preset.paper(layers=(1, 2), max_new_tokens=WORDS, lam=0.0, images=images)
    with counted(model) as work:
        result = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, preset.general_prompt)
    again = images != "refined" and not keeps_features(model)
    assert result.reason is not None and work.tower == 1 + again


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_step_alone_needs_no_layer_behind_the_last_that_is_read(name: str) -> None:
    model, processor = endless(name)
    preset = Preset.paper(layers=(0, 1), steps="t_start", max_new_tokens=WORDS)
    task, general = ids_of(name, [PHOTO], QUESTION, preset), ids_of(name, [PHOTO], preset.general_prompt, preset)
    shared = common_length(task, general)

    with counted(model) as work:
        result = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, QUESTION)
    answers = len(task) + WORDS - 1 + len(ids_of(name, [result.refined], QUESTION, preset)) + WORDS - 1
    instruction = len(general) - shared
    assert work.tokens == [answers + instruction] * 2 + [answers] * 2
    assert work.norm == answers and work.head == 2 * WORDS and work.tower == 2

    with counted(model) as work:
        engine = CarveEngine(model, processor, preset=preset, memory=False, plain=False)
        quick = engine(PHOTO, QUESTION)
    refined = len(ids_of(name, [quick.refined], QUESTION, preset)) + WORDS - 1
    assert work.tokens == [len(task) + instruction + refined] * 2 + [refined] * 2
    assert work.norm == refined and work.head == WORDS
    assert quick.refined_ids == result.refined_ids and quick.answer == "" and quick.answer_ids == ()
    assert torch.allclose(quick.saliency, result.saliency, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("rows", ["question", ("word", "red")])
def test_rows_of_the_prompt_need_no_words_of_the_general_instruction(rows: Any) -> None:
    model, processor = endless("llava")
    preset = Preset.paper(layers=(1,), rows=rows, max_new_tokens=WORDS)
    with counted(model) as work:
        CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, QUESTION)
    assert work.head == 2 * WORDS


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset", [Preset.paper(layers=(1, 2), max_new_tokens=WORDS), Preset.release(layers=(1, 2))])
def test_a_second_question_pays_for_itself(name: str, preset: Preset) -> None:
    model, processor = endless(name)
    engine = CarveEngine(model, processor, preset=preset)
    engine(PHOTO, QUESTION)
    with counted(model) as work:
        result = engine(PHOTO.copy(), OTHER)
    alone = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, OTHER)
    words, asked = preset.max_new_tokens, OTHER + preset.suffix
    task = ids_of(name, [PHOTO], asked, preset)
    head = int((task == model.config.image_token_id).nonzero()[-1]) + 1
    if preset.images == "refined":
        last = len(ids_of(name, [result.refined], asked, preset))
    else:
        last = len(ids_of(name, [PHOTO, result.refined], asked, preset)) - head
    assert work.tower == 1
    # No token of the image and none of the general instruction; a few after the image are shared as well.
    assert work.tokens[0] <= len(task) - head + last + 2 * (words - 1)
    assert work.captures == [(2, 1)] * words
    assert result.answer_ids == alone.answer_ids and result.refined_ids == alone.refined_ids
    assert torch.allclose(result.task.values, alone.task.values, rtol=1e-4, atol=1e-8)


def test_questions_on_one_image_share_it_and_images_share_the_forwards() -> None:
    model, processor = endless("qwen2_5_vl")
    preset = Preset.paper(layers=(1, 2), max_new_tokens=WORDS)
    engine = CarveEngine(model, processor, preset=preset, memory=False)
    other = make_image(120, 200, 2)
    requests = [engine.request(PHOTO, QUESTION), engine.request(other, QUESTION), engine.request(PHOTO, OTHER)]
    with counted(model) as work:
        together = engine.answer(requests)
    assert work.tower == 2 + 3
    # Prefills by image, then steps with three questions and two general instructions: one call for each image.
    assert work.captures == [(2, 3), (2, 2)] * WORDS
    for result, request in zip(together, requests, strict=True):
        alone = engine(request.images[0], request.question)
        assert result.answer_ids == alone.answer_ids and result.refined_ids == alone.refined_ids
        for mine, expected in ((result.task, alone.task), (result.general, alone.general)):
            assert torch.allclose(mine.values, expected.values, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("plain", [True, False])
def test_maps_of_the_last_layer_need_nothing_behind_its_attention(plain: bool) -> None:
    model, processor = endless("llava")
    preset = Preset.paper(layers=(3,), steps="t_start", max_new_tokens=WORDS)
    with counted(model) as work:
        CarveEngine(model, processor, preset=preset, memory=False, plain=plain)(PHOTO, QUESTION)
    assert work.head == WORDS * (1 + plain)


@pytest.mark.parametrize("images", ["refined", "original+refined"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_refined_image_that_is_the_original_is_not_seen_again(name: str, images: str) -> None:
    model, processor = endless(name)
    preset = Preset.paper(layers=(1, 2), max_new_tokens=WORDS, keep=1.0, images=images)
    with counted(model) as work:
        result = CarveEngine(model, processor, preset=preset, memory=False)(PHOTO, QUESTION)
    assert result.refined.tobytes() == result.image.tobytes()
    assert work.tower == 1 + (images != "refined" and not keeps_features(model))
    if images == "refined":
        assert result.refined_ids == result.answer_ids and work.head == 2 * WORDS


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_question_twice_sees_each_image_once(name: str) -> None:
    model, processor = endless(name)
    engine = CarveEngine(model, processor, preset=Preset.paper(layers=(1, 2), max_new_tokens=WORDS), memory=False)
    with counted(model) as work:
        first, second = engine([PHOTO, PHOTO.copy()], QUESTION)
    assert work.tower == 2 and first.refined_ids == second.refined_ids and first.error is None
    assert first.refined_ids == engine(PHOTO, QUESTION).refined_ids


@pytest.mark.parametrize(("memory", "held"), [(False, 1), (None, 2)])
def test_a_prefix_without_further_use_is_freed(memory: Any, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the refined image is seen, the keys of the original are there only if a memory keeps them."""
    model, processor = endless("llava")
    prefixes: weakref.WeakSet[PrefixCache] = weakref.WeakSet()
    init = PrefixCache.__init__
    monkeypatch.setattr(PrefixCache, "__init__", lambda self, ids: prefixes.add(self) or init(self, ids))
    alive: list[int] = []

    def towers(*_: Any) -> None:
        gc.collect()
        alive.append(len(prefixes))

    with watched(model.model.vision_tower, before=towers):
        CarveEngine(model, processor, preset=Preset.paper(layers=(1, 2), max_new_tokens=WORDS), memory=memory)(
            PHOTO, QUESTION
        )
    assert alive == [1, held]
