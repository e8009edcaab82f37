"""The benchmarks stop at a wrong answer before they time anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import bench_capture, bench_engine, bench_pixels, bench_session
from benchmarks.support import cases, engine_opponents, layouts, memory, timing
from carve_kernels.types import Capture, View, VisualLayout
from tests.support.bench import run


def untimed(*_args: object, **_options: object) -> None:
    pytest.fail("timed before the answers were checked")


def test_wrong_regions_stop_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench_pixels.regions
    monkeypatch.setattr(bench_capture, "measure_goals", lambda *_args, **_options: iter(()))
    monkeypatch.setattr(bench_pixels, "regions", lambda *args, **options: honest(*args, **{**options, "keep": 0.3}))
    result = run("cpu")
    assert result.exit_code == 1
    assert "mask" in result.output


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "nan": lambda maps: maps * float("nan"),
    "another token": lambda maps: maps.roll(1, -1),
    "too much": lambda maps: maps * 1.01,
    "flat": lambda maps: maps.mean(-1, keepdim=True).expand_as(maps),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backend_stops_capture(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench_capture.capture

    def broken(*args: Any, **options: Any) -> Capture:
        found = honest(*args, **options)
        return found._replace(maps=FAULTS[fault](found.maps))

    monkeypatch.setattr(timing, "last_level_cache", lambda: 2**20)
    monkeypatch.setattr(bench_capture, "capture", broken)
    monkeypatch.setattr(bench_capture, "paired", untimed)
    result = run("capture")
    assert result.exit_code == 1
    assert "nothing was timed" in result.output


def test_a_wrong_opponent_stops_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def averaged(inputs: cases.Problem) -> torch.Tensor:
        query = inputs.query.unflatten(1, (-1, inputs.group)).mean(2, keepdim=True).expand(-1, -1, inputs.group, -1, -1)
        return honest(dataclasses.replace(inputs, query=query.flatten(1, 2)))

    honest = bench_capture.folded
    monkeypatch.setattr(timing, "last_level_cache", lambda: 2**20)
    monkeypatch.setattr(bench_capture, "folded", averaged)
    monkeypatch.setattr(bench_capture, "paired", untimed)
    result = run("capture")
    assert result.exit_code == 1
    assert "(c) folded" in result.output


def test_a_flat_truth_stops_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda: 2**20)
    monkeypatch.setattr(bench_capture, "truth", lambda inputs: torch.full((1, 1, inputs.tokens.shape[1]), 1e-3))
    monkeypatch.setattr(bench_capture, "paired", untimed)
    result = run("capture")
    assert result.exit_code == 1
    assert "flat" in result.output


LAYOUT_FAULTS: dict[str, tuple[Callable[[View], View], str]] = {
    "another box": (lambda view: dataclasses.replace(view, box=(0.0, 0.0, view.box[2] + 2, view.box[3])), "cells off"),
    "another grid": (lambda view: dataclasses.replace(view, grid=view.grid[::-1]), "expected grids"),
    "another order": (lambda view: dataclasses.replace(view, tokens=view.tokens.flip(0)), "in order"),
    "the next tokens": (lambda view: dataclasses.replace(view, tokens=view.tokens + 1), "in order"),
}


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_a_wrong_layout_stops_layouts(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = LAYOUT_FAULTS[fault]
    honest = layouts.layout_of

    def broken(*args: Any) -> VisualLayout:
        found = honest(*args)
        return dataclasses.replace(found, views=(tuple(map(change, found.views[0])),))

    monkeypatch.setattr(memory, "in_fresh_process", lambda _, task, **__: layouts.measure_here(task))
    monkeypatch.setattr(layouts, "layout_of", broken)
    monkeypatch.setattr(layouts, "paired", untimed)
    result = run("layouts")
    assert result.exit_code == 1
    assert "nothing was timed" in result.output and message in result.output


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_maps_stop_session(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda answer: answer._replace(maps=FAULTS[fault](answer.maps)))
    result = run("session")
    assert result.exit_code == 1
    assert "nothing was timed" in result.output


def test_another_token_stops_session(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda answer: answer._replace(ids=answer.ids + 1))
    result = run("session")
    assert result.exit_code == 1
    assert "tokens" in result.output


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any], name: str = "opponents") -> None:
    honest = getattr(bench_session, name)

    def opponents(*args: Any) -> dict[str, Callable[[], Any]]:
        runs = honest(*args)
        session = runs[bench_session.SESSION]
        return {**runs, bench_session.SESSION: lambda: fault(session())}

    monkeypatch.setattr(bench_session, name, opponents)
    monkeypatch.setattr(bench_session, "paired", untimed)


WRONG_ANSWERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "another map": ("engine", lambda found: with_maps(found, "task", lambda maps: maps * 1.01), "task"),
    "the general map rolled": (
        "engine",
        lambda found: with_maps(found, "general", lambda maps: maps.roll(1, -1)),
        "general",
    ),
    "another answer": ("engine", lambda found: dataclasses.replace(found, answer_ids=(9, 9, 9, 9)), "plain answer"),
    "another refined answer": ("second", lambda found: dataclasses.replace(found, refined_ids=(9,)), "refined answer"),
    "another map by eager": ("eager_task", lambda found: found._replace(maps=found.maps.flip(-1)), "task"),
    "other tokens of the release": ("release_general", lambda found: found._replace(ids=[1]), "(c) release"),
}


@pytest.mark.parametrize("wrong", WRONG_ANSWERS)
def test_a_wrong_answer_of_one_opponent_stops_engine(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, fault, word = WRONG_ANSWERS[wrong]
    honest = getattr(engine_opponents.Opponents, name)
    monkeypatch.setattr(engine_opponents.Opponents, name, lambda opponents: fault(honest(opponents)))
    monkeypatch.setattr(bench_engine, "paired", untimed)
    result = run("engine", "--part", "seconds", "--preset", "paper")
    assert result.exit_code == 1
    assert "nothing was timed" in result.output and word in result.output


def with_maps(found: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    maps = getattr(found, name)
    return dataclasses.replace(found, **{name: dataclasses.replace(maps, values=change(maps.values))})
