"""The user's own function is checked against ours, then timed in turns with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_session
from tests.support.bench import run
from tests.test_benchmark_faults import untimed

HERE = "tests.test_benchmark_opponents"


def eager(model: Any, inputs: Any, *, layers: Any, tokens: Any, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True, output_attentions=True
        )
    maps = [[step[layer][0, :, -1, tokens].float().mean(0) for step in output.attentions] for layer in layers]
    return output.sequences[0, inputs["input_ids"].shape[1] :], torch.stack([torch.stack(steps) for steps in maps])


def broken(change: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *args, **options: change(*eager(*args, **options))


def raises(*_args: Any, **_options: Any) -> None:
    raise RuntimeError("no luck")


def leaves(*_args: Any, **_options: Any) -> None:
    raise SystemExit(0)


def patches(model: Any, inputs: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Its answer is right, but it changes the weights for the others."""
    answer = eager(model, inputs, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    return answer


another_token = broken(lambda ids, maps: (ids + 1, maps))
short = broken(lambda ids, maps: (ids[:-1], maps[:, :-1]))
rolled = broken(lambda ids, maps: (ids, maps.roll(1, -1)))
scaled = broken(lambda ids, maps: (ids, maps * 1.01))
not_finite = broken(lambda ids, maps: (ids, maps * float("nan")))
all_columns = broken(lambda ids, maps: (ids, torch.nn.functional.pad(maps, (0, 1))))
only_ids = broken(lambda ids, _maps: ids)
texts = broken(lambda ids, _maps: (ids, "maps"))
WRONG = {
    "another_token": "expected the tokens",
    "short": "expected the tokens",
    "rolled": "relative error",
    "scaled": "relative error",
    "not_finite": "relative error",
    "all_columns": "expected maps [L, T, N]",
    "only_ids": "expected (ids, maps)",
    "texts": "expected (ids, maps)",
    "raises": "raised RuntimeError: no luck",
    "leaves": "raised SystemExit",
    "patches": "another answer after it",
}


@pytest.fixture(autouse=True)
def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # It starts processes, and has no opponent of the user.
    monkeypatch.setattr(bench_session, "memory", lambda *_args, **_options: [])


def test_the_function_is_timed_with_ours(tmp_path: Path) -> None:
    result = run("session", "--opponent", f"{HERE}:eager", "--output", str(tmp_path / "session.json"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "session.json").read_text())
    assert report["settings"]["opponent"] == f"{HERE}:eager"
    for line in report["results"]["price"]:
        assert line["seconds"][f"--opponent {HERE}:eager"]["rounds"] == line["seconds"]["session"]["rounds"] == 3
        assert f"--opponent {HERE}:eager" in line["ratio_to_plain"]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_function_is_one_error_before_anything_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_session, "paired", untimed)
    result = run("session", "--opponent", f"{HERE}:{name}")
    assert result.exit_code == 1
    assert f"--opponent {HERE}:{name}" in result.output and WRONG[name] in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("eager", "package.module:function"),
        (":eager", "package.module:function"),
        (f"{HERE}:nothing", "expected a function"),
        (f"{HERE}:WRONG", "expected a function"),
        ("no.such.module:eager", "cannot be"),
    ],
)
def test_a_name_without_a_function_is_refused(path: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_session, "price", untimed)
    result = run("session", "--opponent", path)
    assert result.exit_code == 2
    assert "--opponent" in result.output and word in result.output
