"""Many questions, many images: the same results as one by one, in order, whatever is wrong with some of them."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset
from carve_kernels.checks import BackendUnavailable
from carve_kernels.hf.engine import batching
from carve_kernels.hf.engine.batching import MAX_BATCH, answer_all, free_bytes, stream
from carve_kernels.hf.engine.result import CarveFailure, CarveResult
from tests.support.counting import QUESTIONS, Counting
from tests.support.families import family, state, watched
from tests.support.tiny_models import make_image

SHORT = Preset.paper(max_new_tokens=3)


def same(one: Any, other: CarveResult) -> bool:
    return (
        (one.answer_ids, one.refined_ids, one.question, one.prompt, one.error)
        == (other.answer_ids, other.refined_ids, other.question, other.prompt, None)
        and torch.allclose(one.task.values, other.task.values, rtol=1e-4, atol=1e-7)
        and torch.allclose(one.general.values, other.general.values, rtol=1e-4, atol=1e-7)
        and (one.mask != other.mask).float().mean() < 1e-3
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("preset", [SHORT, Preset.release(layers=(1, 2), max_new_tokens=3)])
def test_a_batch_answers_what_single_questions_answer(name: str, preset: Preset) -> None:
    model, processor = family(name)
    before = state(model)
    images = [make_image(120, 80, 1), make_image(120, 80, 1), make_image(90, 140, 2), make_image(100, 100, 3)]
    engine = CarveEngine(model, processor, preset=preset, memory=False)
    expected = [engine(image, question) for image, question in zip(images, QUESTIONS, strict=True)]
    found = engine(images, QUESTIONS)
    assert [same(one, other) for one, other in zip(found, expected, strict=True)] == [True] * 4
    remembering = CarveEngine(model, processor, preset=preset)
    for tokens in (None, 1):
        again = list(remembering.stream(images, QUESTIONS, tokens=tokens))
        assert all(same(one, other) for one, other in zip(again, expected, strict=True))
    assert state(model) == before


def test_one_image_and_many_questions_or_the_other_way_round() -> None:
    asked = [("p", "a", None), ("p", "b", None)]
    assert list(stream(Counting(), "p", ["a", "b"])) == asked
    assert list(stream(Counting(), ["p", "q"], "a", "all of it")) == [("p", "a", "all of it"), ("q", "a", "all of it")]
    assert list(stream(Counting(), ("p", "q"), ("a", "b"), [None, "x"])) == [("p", "a", None), ("q", "b", "x")]
    assert list(stream(Counting(), "p", "a")) == [("p", "a", None)]
    assert list(stream(Counting(), Path("p"), iter(["a"]))) == [(Path("p"), "a", None)]
    assert list(stream(Counting(), [], [])) == list(stream(Counting(), "p", [])) == []
    assert CarveEngine(*family("llava"), preset=SHORT)([], []) == []


def test_what_does_not_fit_together_is_an_error_before_any_work() -> None:
    engine = Counting()
    with pytest.raises(ValueError, match="images, questions: expected one length, got 2, 3"):
        stream(engine, ["p", "q"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="images, questions, prompts: expected one length, got 2, 2, 1"):
        stream(engine, ["p", "q"], ["a", "b"], ["x"])
    for wrong in (3, None, b"image", {"p": 1}, {"p"}, numpy.zeros((2, 2)), torch.zeros(2)):
        with pytest.raises(TypeError, match="images: expected a path or a PIL image, a list or an iterator"):
            stream(engine, wrong, "a")
    with pytest.raises(TypeError, match="questions: expected a text, a list or an iterator of them, got int 3"):
        stream(engine, "p", 3)
    with pytest.raises(TypeError, match="prompts: expected a text"):
        stream(engine, "p", "a", 3)
    with pytest.raises(ValueError, match="tokens: expected an integer of at least 1"):
        stream(engine, "p", "a", tokens=0)
    with pytest.raises(TypeError, match="on_progress: expected a function or None, got int 3"):
        stream(engine, "p", "a", on_progress=3)  # type: ignore[arg-type]
    # A call of the engine has other names.
    with pytest.raises(ValueError, match=r"^image, question: expected one length, got 2, 1"):
        answer_all(engine, ["p", "q"], ["a"])
    with pytest.raises(TypeError, match=r"^question: expected a text, a list or an iterator of them, got int 3"):
        answer_all(engine, ["p"], 3)
    assert engine.groups == []
    outcomes = stream(engine, iter(["p", "q"]), iter(["a", "b", "c"]), tokens=1)
    assert next(outcomes) == ("p", "a", None)
    with pytest.raises(ValueError, match="expected as many of each, but one ended after 2"):
        list(outcomes)


@pytest.mark.parametrize(
    ("limit", "groups"),
    [(1, [1] * 10), (19, [1] * 10), (20, [2] * 5), (35, [3, 3, 3, 1]), (10_000, [MAX_BATCH, 10 - MAX_BATCH])],
)
def test_groups_hold_what_fits(limit: int, groups: list[int]) -> None:
    engine = Counting(tokens=10)
    questions = [str(number) for number in range(10)]
    found = list(stream(engine, "p", questions, tokens=limit))
    assert [question for _, question, _ in found] == questions
    assert [len(group) for group in engine.groups] == groups


def test_the_bound_comes_from_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Counting(tokens=10)
    # A quarter of it holds 25 tokens.
    monkeypatch.setattr(batching, "free_bytes", lambda device: 4 * 25 * 1000)
    list(stream(engine, "p", ["a", "b", "c", "d", "e"]))
    assert [len(group) for group in engine.groups] == [2, 2, 1]
    # The states of a request, three for each prompt, take as much as 3 tokens.
    engine = Counting(tokens=10)
    engine.bytes_per_prompt = 999
    list(stream(engine, "p", ["a", "b", "c", "d", "e"]))
    assert [len(group) for group in engine.groups] == [1] * 5
    engine.groups.clear()
    list(stream(engine, "p", ["a", "b", "c", "d", "e"], tokens=20))
    assert [len(group) for group in engine.groups] == [2, 2, 1]


def test_free_memory_is_what_the_machine_and_the_container_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(batching, "_CGROUP", tmp_path)
    machine = free_bytes(cpu)
    assert 2**20 < machine < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert free_bytes(cpu) > 2**20
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(cpu) == 450
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_bytes(cpu) == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_bytes(torch.device("cuda", 0)) == 1200


def test_bad_images_and_questions_are_outcomes_and_the_others_go_on(tmp_path: Path) -> None:
    model, processor = family("llava")
    before = state(model)
    engine = CarveEngine(model, processor, preset=Preset.paper(rows=("word", "red"), max_new_tokens=3))
    good, broken = make_image(120, 80, 1), tmp_path / "broken.png"
    broken.write_text("no image")
    cases: list[tuple[Any, Any, type[Exception] | None, str]] = [
        (good, "what is red", None, ""),
        (tmp_path / "missing.png", "what is red", ValueError, "missing.png is missing"),
        (good, "what is blue", ValueError, "rows: expected a word of the prompt"),
        (broken, "what is red", ValueError, "cannot be read as an image"),
        (good, "is it red", None, ""),
        (good, " ", ValueError, "question: expected"),
        (7, "what is red", TypeError, "image: expected"),
        (good, None, TypeError, "question: expected a string"),
        (good, "red", None, ""),
    ]
    reported: list[tuple[Any, int, int | None]] = []
    found = engine(
        [case[0] for case in cases],
        [case[1] for case in cases],
        on_progress=lambda outcome, done, total: reported.append((outcome, done, total)),
    )
    assert [outcome for outcome, _, _ in reported] == found
    assert [(done, total) for _, done, total in reported] == [(number, 9) for number in range(1, 10)]
    for outcome, (image, question, kind, message) in zip(found, cases, strict=True):
        assert outcome.question == question
        if kind is None:
            assert isinstance(outcome, CarveResult) and outcome.error is None
            assert outcome.answer_ids == engine(image, question).answer_ids
        else:
            assert isinstance(outcome, CarveFailure) and type(outcome.error) is kind
            assert message in str(outcome.error) and outcome.image is image
    assert state(model) == before


def test_a_group_that_fails_is_asked_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    engine = Counting({"c": torch.OutOfMemoryError("CUDA out of memory")})
    with caplog.at_level(logging.WARNING, "carve_kernels"):
        found = list(stream(engine, "p", ["a", "bad", "b", "c", "d"], tokens=100))
    assert engine.groups == [["a"], ["b", "c", "d"], ["b"], ["c"], ["d"]]
    assert [getattr(outcome, "error", None) is None for outcome in found] == [True, False, True, False, True]
    assert isinstance(found[3].error, torch.OutOfMemoryError) and found[3].error.__traceback__ is None
    assert "3 questions failed in one batch (CUDA out of memory)" in caplog.text
    cpu = Counting({"c": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")})
    assert isinstance(list(stream(cpu, "p", ["b", "c"]))[1], CarveFailure)


@pytest.mark.parametrize("fault", [RuntimeError("a fault of ours"), IndexError("out of range")])
def test_an_internal_error_is_logged_with_its_traceback(fault: Exception, caplog: pytest.LogCaptureFixture) -> None:
    found = list(stream(Counting({"b": fault}), "p", ["a", "b", "c"]))
    assert [isinstance(outcome, CarveFailure) for outcome in found] == [False, True, False]
    assert found[1].error is fault and "in answer" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("fault", [BackendUnavailable("no backend"), torch.AcceleratorError("device-side assert")])
@pytest.mark.parametrize("tokens", [10, 100])
def test_fatal_errors_end_the_batch(fault: Exception, tokens: int) -> None:
    outcomes = stream(Counting({"b": fault}), "p", ["a", "bad", "b", "c"], tokens=tokens)
    assert next(outcomes) == ("p", "a", None) and isinstance(next(outcomes), CarveFailure)
    with pytest.raises(type(fault)):
        next(outcomes)


def test_what_waits_is_answered_before_a_batch_ends() -> None:
    engine = Counting()
    outcomes = stream(engine, "p", ["a", "bad", "b", "c", "broken", "d"], tokens=100)
    assert [next(outcomes) for _ in range(4)][2:] == [("p", "b", None), ("p", "c", None)]
    with pytest.raises(BackendUnavailable, match="no backend"):
        next(outcomes)
    assert engine.groups == [["a"], ["b", "c"]]


def test_results_are_not_held_and_iterators_may_be_endless() -> None:
    engine = CarveEngine(*family("llava"), preset=Preset.paper(steps="t_start", max_new_tokens=1))
    drawn: list[weakref.ref[Image.Image]] = []

    def endless_images() -> Iterator[Image.Image]:
        for seed in itertools.count():
            image = make_image(96, 96, seed)
            drawn.append(weakref.ref(image))
            yield image

    outcomes = engine.stream(endless_images(), itertools.cycle(QUESTIONS), tokens=200)
    for outcome in itertools.islice(outcomes, 12):
        assert outcome.error is None
    del outcome
    gc.collect()
    assert len(drawn) >= 12 and sum(image() is not None for image in drawn) <= 4
    outcomes.close()
    gc.collect()
    assert sum(image() is not None for image in drawn) == 0


def test_ctrl_c_leaves_the_model_as_it_was() -> None:
    model, processor = family("qwen2_5_vl")
    engine = CarveEngine(model, processor, preset=SHORT)
    before, calls = state(model), []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    images = [make_image(120, 80, seed) for seed in range(3)]
    layer = model.model.language_model.layers[1]
    with pytest.raises(KeyboardInterrupt), watched(layer, before=interrupt):
        engine(images, QUESTIONS[0])
    assert state(model) == before
    alone = CarveEngine(model, processor, preset=SHORT, memory=False)
    found = engine(images, QUESTIONS[0])
    assert all(same(one, alone(image, QUESTIONS[0])) for one, image in zip(found, images, strict=True))
