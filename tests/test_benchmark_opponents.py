"""The user's own function and checkpoint are checked against ours, then timed in turns with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_engine, bench_session
from benchmarks.support import engine_opponents
from carve_kernels import CarveEngine
from tests.support import tiny_models
from tests.support.bench import run
from tests.test_benchmark_faults import FAULTS, plant, untimed

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


def engine(model: Any, processor: Any, image: Any, question: str, *, preset: Any) -> tuple[list[int], torch.Tensor]:
    result = CarveEngine(model, processor, preset=preset, memory=False)(image, question)
    return list(result.refined_ids), result.saliency


def engine_of_another_image(*args: Any, **options: Any) -> tuple[list[int], torch.Tensor]:
    ids, saliency = engine(*args, **options)
    return ids, saliency.flip(-1)


def engine_with_another_answer(*args: Any, **options: Any) -> tuple[list[int], torch.Tensor]:
    ids, saliency = engine(*args, **options)
    return [ids[0] + 1, *ids[1:]], saliency


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save(*tiny_models.tiny_llava(), tmp_path_factory.mktemp("benchmark") / "mine"))


def test_a_checkpoint_takes_the_place_of_the_random_model(checkpoint: str, tmp_path: Path) -> None:
    files = "--output", str(tmp_path / "session.json"), "--csv", str(tmp_path / "session.csv")
    result = run("session", "--model", checkpoint, "--opponent", f"{HERE}:eager", *files)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "session.json").read_text())
    assert report["settings"]["model"] == "mine" and "hidden" not in report["settings"]
    prices = report["results"]["price"]
    # 36 image tokens and a question.
    assert [line["new_tokens"] for line in prices] == [1, 2] and all(36 < line["length"] < 100 for line in prices)
    names = {"plain", "session", "eager", f"--opponent {HERE}:eager"}
    assert all(set(line["seconds"]) == names for line in prices)
    assert not report["results"]["memory"] and "peak memory" not in result.output


def test_a_checkpoint_in_bfloat16_is_checked_by_correlation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_models.tiny_llava()
    path = str(tiny_models.save(model.bfloat16(), processor, tmp_path / "half"))
    assert run("session", "--model", path).exit_code == 0
    monkeypatch.setattr(bench_session, "paired", untimed)
    result = run("session", "--model", path, "--opponent", f"{HERE}:rolled")
    assert result.exit_code == 1
    assert f"--opponent {HERE}:rolled: expected a correlation" in result.output


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_maps_of_a_checkpoint_are_not_timed(fault: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda answer: answer._replace(maps=FAULTS[fault](answer.maps)), "of_subject")
    result = run("session", "--model", checkpoint)
    assert result.exit_code == 1
    assert "nothing was timed" in result.output


def test_a_checkpoint_whose_check_does_not_fit_is_not_timed(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_session, "kilobytes", lambda *_args: 1000)
    monkeypatch.setattr(bench_session, "paired", untimed)
    result = run("session", "--model", checkpoint)
    assert result.exit_code == 1
    assert "--model" in result.output


@pytest.mark.parametrize(
    "words", [("--hidden", "256"), ("--memory", "128"), ("--dtype", "bfloat16"), ("--length", "64")]
)
def test_options_of_the_random_model_are_refused_with_a_checkpoint(words: tuple[str, str], checkpoint: str) -> None:
    result = run("session", "--model", checkpoint, *words)
    assert result.exit_code == 2
    assert words[0] in result.output and "--model" in result.output


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    result = run("session", "--model", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "--model: expected a checkpoint" in result.output


def test_an_engine_of_the_user_is_timed_with_ours(tmp_path: Path) -> None:
    words = "--part", "seconds", "--preset", "paper", "--opponent", f"{HERE}:engine"
    result = run("engine", *words, "--output", str(tmp_path / "engine.json"))
    assert result.exit_code == 0, result.output
    lines = json.loads((tmp_path / "engine.json").read_text())["results"]
    assert sum(f"--opponent {HERE}:engine" in line["seconds"] for line in lines) == 2
    assert sum(f"--opponent {HERE}:engine / (a)" in line["ratios"] for line in lines) == 2


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("engine_of_another_image", "saliency within"),
        ("engine_with_another_answer", "expected the tokens"),
        ("raises", "raised RuntimeError: no luck"),
    ],
)
def test_a_wrong_engine_is_not_timed(name: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_engine, "paired", untimed)
    result = run("engine", "--part", "seconds", "--preset", "paper", "--opponent", f"{HERE}:{name}")
    assert result.exit_code == 1
    assert f"--opponent {HERE}:{name}" in result.output and word in result.output


def test_an_engine_of_the_user_is_timed_on_a_checkpoint(checkpoint: str, tmp_path: Path) -> None:
    words = "--model", checkpoint, "--part", "seconds", "--preset", "paper", "--opponent", f"{HERE}:engine"
    result = run("engine", *words, "--output", str(tmp_path / "engine.json"))
    assert result.exit_code == 0, result.output
    lines = json.loads((tmp_path / "engine.json").read_text())["results"]
    assert sum(f"--opponent {HERE}:engine" in line["seconds"] for line in lines) == 1


@pytest.mark.parametrize("name", ["engine", "second", "eager_task", "release_general"])
def test_a_wrong_opponent_is_not_timed_on_a_checkpoint(
    name: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = getattr(engine_opponents.Opponents, name)

    def rolled(opponents: Any) -> Any:
        found = honest(opponents)
        if isinstance(found, engine_opponents.Pass):
            return found._replace(maps=found.maps.roll(1, -1))
        task = dataclasses.replace(found.task, values=found.task.values.roll(1, -1))
        return dataclasses.replace(found, task=task)

    monkeypatch.setattr(engine_opponents.Opponents, name, rolled)
    monkeypatch.setattr(bench_engine, "paired", untimed)
    result = run("engine", "--model", checkpoint, "--part", "seconds", "--preset", "paper")
    assert result.exit_code == 1
    assert "nothing was timed" in result.output and "relative error" in result.output


def test_a_checkpoint_in_bfloat16_is_measured_by_engine(tmp_path: Path) -> None:
    model, processor = tiny_models.tiny_llava()
    path = str(tiny_models.save(model.bfloat16(), processor, tmp_path / "half"))
    result = run("engine", "--model", path, "--part", "seconds", "--preset", "paper")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("words", [("--hidden", "256"), ("--visual", "64"), ("--dtype", "float32")])
def test_options_of_the_random_model_are_refused_by_engine(words: tuple[str, str], checkpoint: str) -> None:
    result = run("engine", "--model", checkpoint, *words)
    assert result.exit_code == 2
    assert words[0] in result.output and "--model" in result.output
    missing = run("engine", "--model", checkpoint + "none")
    assert missing.exit_code == 2 and "--model: expected a checkpoint" in missing.output
