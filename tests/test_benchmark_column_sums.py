"""`python -m benchmarks column_sums` checks its answers first, and judges the cost of the sums."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import bench_column_sums as bench
from benchmarks.support import memory
from tests.support.bench import run


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes seconds to import torch."""
    monkeypatch.setattr(memory, "in_fresh_process", lambda _module, task: 2**20 * len(task["name"]))


@pytest.mark.usefixtures("in_this_process")
def test_seconds_and_peaks_of_every_way(tmp_path: Path) -> None:
    result = run("column_sums", "--output", str(tmp_path / "sums.json"))
    assert result.exit_code == 0, result.output
    seconds, peaks = json.loads((tmp_path / "sums.json").read_text())["results"]
    assert set(seconds["seconds"]) == {"sdpa", "sdpa + sums", "sdpa + sums, no lse"}
    assert set(seconds["ratios"]) == set(seconds["seconds"]) - {"sdpa"}
    assert peaks["bytes"]["sdpa"] == 4 * 2**20 and set(peaks["bytes"]) == {*seconds["seconds"], "eager"}
    assert "Peak memory" in result.output and "MiB" in result.output


def test_the_goal_is_judged() -> None:
    entry = bench.measure("qwen2.5-vl-7b", 64, rounds=3)
    assert [goal["goal"] for goal in entry["goals"]] == ["sdpa + sums <= 1.6"]


def test_the_truth_is_eager_attention() -> None:
    layer = bench.layer_of("qwen2.5-vl-7b", 48)
    scores = layer.query.double() @ layer.repeated.double().mT * layer.scale
    hidden = torch.ones(48, 48, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum((1, 2))
    torch.testing.assert_close(bench.truth(layer), expected)


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "a key late": lambda sums: sums.roll(1, -1),
    "flat": lambda sums: sums.mean(-1, keepdim=True).expand_as(sums),
    "the last key left out": lambda sums: torch.cat([sums[..., :-1], 0 * sums[..., -1:]], -1),
}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", FAULTS)
def test_wrong_sums_stop_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench.column_sums
    monkeypatch.setattr(bench, "column_sums", lambda *given, **options: FAULTS[name](honest(*given, **options)))
    monkeypatch.setattr(bench, "paired", lambda *_, **__: pytest.fail("timed before it was checked"))
    result = run("column_sums")
    assert result.exit_code == 1
    assert "sdpa + sums: expected a relative error" in result.output


def test_the_peak_of_a_way_is_measured() -> None:
    threads = torch.get_num_threads()
    try:
        assert bench.peak_here({"name": "eager", "geometry": "qwen2.5-vl-7b", "length": 512}) > 28 * 512 * 512 * 2
    finally:
        torch.set_num_threads(threads)
