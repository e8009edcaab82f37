"""What a batch holds at a time: no more images than fit, no question before its turn, nothing that is lost."""

from __future__ import annotations

import io
import itertools
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from carve_kernels import CarveEngine, Preset
from carve_kernels.hf.engine.batching import MAX_BATCH, stream
from tests.support.counting import QUESTIONS, Counting
from tests.support.families import family
from tests.support.tiny_models import make_image

SHORT = Preset.paper(max_new_tokens=3)


class _Prepared(SimpleNamespace):
    __hash__ = object.__hash__


class Crowded(Counting):
    """An engine whose memory holds only so many prepared requests, and answers only so many together."""

    def __init__(self, prepared: int, together: int) -> None:
        super().__init__()
        self._alive: weakref.WeakSet[_Prepared] = weakref.WeakSet()
        self._prepared, self._together = prepared, together

    def request(self, image: Any, question: str, prompt: str | None) -> Any:
        if len(self._alive) >= self._prepared:
            raise MemoryError("no memory for the image")
        made = _Prepared(**vars(super().request(image, question, prompt)))
        self._alive.add(made)
        return made

    def answer(self, requests: list[Any]) -> list[Any]:
        if len(self._alive) > self._together:
            raise RuntimeError("can't allocate memory")
        return super().answer(requests)


@pytest.mark.parametrize(("prepared", "together"), [(3, 9), (9, 1), (3, 1), (1, 1)])
def test_a_request_that_fits_alone_is_answered(prepared: int, together: int) -> None:
    found = list(stream(Crowded(prepared, together), "p", list("abcdefghij"), tokens=1000))
    assert found == [("p", letter, None) for letter in "abcdefghij"]


def test_a_full_group_is_answered_before_the_next_question_is_drawn() -> None:
    drawn: list[int] = []

    def questions() -> Iterator[str]:
        for number in itertools.count():
            drawn.append(number)
            yield str(number)

    for tokens, group in ((10, 1), (30, 3), (1000, MAX_BATCH)):
        drawn.clear()
        outcomes = stream(Counting(), "p", questions(), tokens=tokens)
        next(outcomes)
        assert len(drawn) == group


def test_what_was_drawn_is_answered_before_an_iterators_error() -> None:
    def image_paths() -> Iterator[str]:
        yield from "pq"
        raise OSError("the disk is gone")

    outcomes = stream(Counting(), image_paths(), itertools.repeat("a"), tokens=1000)
    assert [next(outcomes), next(outcomes)] == [("p", "a", None), ("q", "a", None)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(outcomes)
    outcomes = stream(Counting(), iter("pqr"), iter("ab"), tokens=1000)
    assert [next(outcomes), next(outcomes)] == [("p", "a", None), ("q", "b", None)]
    with pytest.raises(ValueError, match="expected as many of each, but one ended after 2"):
        next(outcomes)


class Endless(torch.utils.data.IterableDataset[Any]):
    """A data set of two images with an unused length."""

    def __iter__(self) -> Iterator[Any]:
        return iter([make_image(90, 140, 2), make_image(120, 80, 1)])


def test_the_engine_takes_whatever_can_be_iterated() -> None:
    model, processor = family("llava")
    engine = CarveEngine(model, processor, preset=SHORT)
    by_name = {"one": make_image(120, 80, 1), "two": make_image(90, 140, 2)}
    expected = [result.answer_ids for result in engine(list(by_name.values()), QUESTIONS[0])]
    for images in (by_name.values(), iter(by_name.values()), (image for image in by_name.values())):
        assert [result.answer_ids for result in engine(images, QUESTIONS[0])] == expected
    assert [result.answer_ids for result in engine(by_name["one"], (text for text in QUESTIONS[:1]))] == expected[:1]
    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    assert engine(loader, iter(QUESTIONS[:1] * 2))[1].answer_ids == expected[0]
    for images in ({"one.png"}, by_name, io.BytesIO(b"1\n2"), numpy.zeros((3, 4, 4)), torch.zeros(3, 4, 4)):
        with pytest.raises(TypeError, match="image"):
            engine(images, QUESTIONS[0])
