"""The recipes against plain NumPy and SciPy, planted answers, and end to end on real model classes."""

from __future__ import annotations

import functools
import math
import re
import runpy
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from carve_kernels import CarveEngine, capture_attention, load
from carve_kernels.frontends import recipes
from carve_kernels.models.scenes import draw_scene
from tests.support.families import eager, family, generate, in_eager, inputs_of
from tests.support.processors.kinds import pair

SMALL = Path(__file__).resolve().parents[2] / "examples" / "small_vlm"


def maps_of(layers: int, heads: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random attention [L, A, N]: sums between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(layers, heads, tokens, generator=generator, dtype=torch.float64) ** 4
    return values / values.sum(-1, keepdim=True) * torch.rand(layers, heads, 1, generator=generator)


@functools.cache
def embedded() -> tuple[Any, Any]:
    model, processor = load("small")
    return model.float(), processor


# The layer of the question.


@pytest.mark.parametrize(("layers", "heads", "tokens", "most"), [(5, 3, 7, 2), (2, 1, 11, 1), (4, 6, 1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_activation_is_that_of_the_equation(
    layers: int, heads: int, tokens: int, most: int, dtype: torch.dtype
) -> None:
    task, without = (maps_of(layers, heads, tokens, seed).to(dtype) for seed in (0, 1))
    found = recipes.query_layer(task, without, heads=most)
    changed = np.maximum(task.numpy().astype(float) - without.numpy(), 0)
    norms = np.sqrt((changed**2).sum(-1))
    expected = np.sort(norms, -1)[:, -most:].mean(-1)
    assert found.activation.dtype == dtype
    np.testing.assert_allclose(found.activation.numpy(), expected, rtol=1e-5)
    assert torch.equal(recipes.query_activation(task, without, heads=most), found.activation)
    best = int(expected.argmax())
    of_best = changed[best][np.argsort(norms[best])[-most:]].mean(0)
    assert found.place == best
    np.testing.assert_allclose(found.map.numpy(), of_best, rtol=1e-5, atol=1e-12)


def test_a_planted_layer_is_found_and_its_map_is_what_the_question_changed() -> None:
    without = maps_of(6, 4, 30).float()
    task = without.clone()
    task[4, 2, 13] += 0.5
    task[1] *= 0.1  # attention that the question takes away does not count
    found = recipes.query_layer(task.numpy(), without.tolist(), heads=1)
    assert found.place == 4 and int(found.map.argmax()) == 13 and int((found.map > 0).sum()) == 1
    torch.testing.assert_close(found.activation, torch.tensor([0.0, 0, 0, 0, 0.5, 0]))
    torch.testing.assert_close(recipes.query_activation(task, without)[4], torch.tensor(0.125))
    same = recipes.query_layer(task, task)
    assert same.place == 0 and not same.map.any() and not same.activation.any()


# Heads.


@pytest.mark.parametrize("grid", [(5, 7), (1, 9), (12, 12), (3, 1)])
def test_spatial_entropy_equals_scipys_parts(grid: tuple[int, int]) -> None:
    maps = maps_of(4, 9, grid[0] * grid[1])
    found = recipes.spatial_entropy(maps, grid)
    assert found.shape == (4, 9) and found.dtype == torch.float64
    for layer, head in product(range(4), range(9)):
        values = maps[layer, head].numpy().reshape(grid)
        labels, count = ndimage.label(values > values.mean(), np.ones((3, 3)))
        shares = np.bincount(labels.ravel())[1 : count + 1] / (labels > 0).sum()
        assert float(found[layer, head]) == pytest.approx(float(-(shares * np.log(shares)).sum()), abs=1e-12)
    assert len(set(found.flatten().tolist())) > 5 or min(grid) == 1
    assert torch.equal(recipes.spatial_entropy(maps[2, 3], grid), found[2, 3])
    assert torch.equal(recipes.spatial_entropy(maps.float(), grid), found)


def test_planted_spatial_entropies() -> None:
    one, corner, two, flat = np.zeros((4, 3, 4))
    one[0, 1:3] = 1
    corner[0, 0] = corner[1, 1] = corner[2, 2] = 1
    two[0, 0] = two[2, 3] = two[1, 3] = 1
    found = recipes.spatial_entropy(np.stack([one, corner, two, flat]).reshape(4, 12), (3, 4))
    of_two = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert found.tolist() == pytest.approx([0, 0, of_two, math.inf])


def test_concentrated_heads_attend_to_the_image_and_to_one_place() -> None:
    rows, columns = grid = (6, 5)
    maps = torch.full((3, 4, rows * columns), 0.001)
    scattered = torch.zeros(rows, columns)
    scattered[::2, ::2] = 0.08
    maps[:] += scattered.flatten()  # all attend to the image, at nine places
    maps[0, 1] = maps[2, 3] = maps[1, 1] = 0
    maps[0, 1, 7] = 0.01  # one place, but hardly at the image
    maps[2, 3, [7, 8, 12]] = 0.3
    maps[1, 1, [0, 29]] = 0.45
    assert recipes.concentrated_heads(maps, grid, count=2, mass=0.5) == [(2, 3), (1, 1)]
    assert recipes.concentrated_heads(maps, grid, count=2, mass=0.0) == [(0, 1), (2, 3)]
    # The sorted shares are 0.01, 0.75 nine times, and 0.9 twice: the bend is at the first 0.75.
    assert recipes.concentrated_heads(maps, grid, count=12)[:2] == [(2, 3), (1, 1)]
    assert (0, 1) not in recipes.concentrated_heads(maps, grid, count=12)
    assert recipes.concentrated_heads(torch.full((2, 2, 30), 0.1), grid) == []


def test_frequent_heads() -> None:
    choices = [[(0, 1), (2, 3)], [(2, 3), (1, 0)], [(1, 0)], [(2, 3), (2, 3)]]
    assert recipes.frequent_heads(choices, count=2) == [(2, 3), (1, 0)]
    assert recipes.frequent_heads(iter(choices)) == [(2, 3), (1, 0), (0, 1)]
    assert recipes.frequent_heads([[(4, 4), (3, 9)]], count=1) == [(3, 9)]
    assert recipes.frequent_heads([]) == []


def test_grounding_heads_attend_inside_of_the_place() -> None:
    maps = [maps_of(4, 3, 20, seed) for seed in range(3)]
    inside = [torch.rand(20, generator=torch.Generator().manual_seed(seed)) < 0.3 for seed in range(3)]
    expected = np.zeros((4, 3))
    for values, place in zip(maps, inside, strict=True):
        expected += values[..., place].sum(-1).numpy() / values.sum(-1).numpy()
    order = np.dstack(np.unravel_index(np.argsort(-expected.ravel(), kind="stable"), expected.shape))[0]
    assert recipes.grounding_heads(maps, inside, count=12) == [tuple(pair) for pair in order.tolist()]
    maps[0][order[0][0], order[0][1]] = 0  # a head without attention on the image, and not NaN
    assert recipes.grounding_heads(maps, inside, count=12) != [tuple(pair) for pair in order.tolist()]
    planted = maps_of(2, 2, 20)
    planted[1, 0] = inside[0] * 0.1
    assert recipes.grounding_heads([planted], [inside[0].tolist()], count=1) == [(1, 0)]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_maps_of_heads_are_eagers(name: str) -> None:
    model, inputs = family(name)[0], inputs_of(name, 3)
    kept = recipes.HeadMaps()
    with capture_attention(model, layers=[3, 1], heads="each", on_layer=kept) as session:
        generate(model, inputs_of(name, 1), steps=3)
        generate(model, inputs, steps=2)
    assert torch.equal(eager(name, 3, "dynamic")[0][:, -5], session_ids(model, inputs))
    attentions = generate(in_eager(name), inputs, steps=2, output_attentions=True).attentions
    for b, step in product(range(3), range(2)):
        columns = session.maps.tokens[b]
        used = columns >= 0
        expected = torch.stack([attentions[step][layer][b, :, -1, columns[used].long()] for layer in (1, 3)])
        found = kept.maps(b, step)
        torch.testing.assert_close(found[..., used], expected, rtol=1e-4, atol=1e-8)
        assert not found[..., ~used].any()
    with pytest.raises(ValueError, match=r"step: expected one of \[0, 1\], got int 2"):
        kept.maps(step=2)
    with pytest.raises(ValueError, match="b: expected an integer from 0 to 2"):
        kept.maps(3)
    with pytest.raises(ValueError, match="row: expected an integer from -1 to 0"):
        kept.maps(row=1)


def session_ids(model: Any, inputs: Any) -> torch.Tensor:
    """The first new token of each prompt."""
    first: torch.Tensor = generate(model, inputs, steps=1).sequences[:, -1]
    return first


def test_the_maps_of_heads_need_a_session_with_them() -> None:
    kept = recipes.HeadMaps()
    with pytest.raises(ValueError, match="maps: expected a forward"):
        kept.maps()
    with (
        capture_attention(family("llava")[0], layers=[0], on_layer=kept),
        pytest.raises(ValueError, match="heads: expected a session with heads='each', got one with heads='mean'"),
    ):
        generate(family("llava")[0], inputs_of("llava", 1), steps=1)


# Only when unsure.


def test_confidence_is_the_mean_probability_of_the_tokens() -> None:
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * 3
    scores[1, 2] = -math.inf
    ids = [3, 0, 8, 8]
    shifted = np.exp(scores.double().numpy() - scores.double().numpy().max(-1, keepdims=True))
    expected = float((shifted / shifted.sum(-1, keepdims=True))[np.arange(4), ids].mean())
    assert recipes.confidence(scores, ids) == pytest.approx(expected, rel=1e-12)
    assert recipes.confidence(tuple(scores[:, None]), torch.tensor([ids])) == pytest.approx(expected, rel=1e-12)
    assert recipes.confidence(scores.tolist(), np.array(ids)) == pytest.approx(expected, rel=1e-6)
    assert recipes.confidence(torch.tensor([[0.0, 100.0]]), [1]) == 1.0


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_sure_answer_is_the_plain_one_and_an_unsure_one_is_carves(name: str) -> None:
    model, processor = pair(name)
    image = draw_scene(3, 4).image.resize((120, 90))
    engine = CarveEngine(model, processor, preset={"max_new_tokens": 5}, memory=False, profile=False)
    expected = engine(image, "what digit is red")
    sure = recipes.carve_if_unsure(engine, image, "what digit is red", threshold=0.0)
    assert sure.answer == sure.plain == expected.answer and sure.carved is None and 0 < sure.confidence < 1
    # The probabilities of the same answer, out of one forward over the prompt and it.
    prompt = engine.request(image, "what digit is red")
    ids = torch.tensor([expected.answer_ids])
    inputs = {**prompt.task.inputs, **prompt.features.entries}
    count = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    for entry in ("attention_mask", "mm_token_type_ids"):
        if entry in inputs:
            more = torch.full_like(ids, int(entry == "attention_mask"))
            inputs[entry] = torch.cat([inputs[entry], more], 1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, count - 1 : -1]
    assert sure.confidence == pytest.approx(float(logits.softmax(-1).gather(1, ids.T).mean()), rel=1e-4)
    unsure = recipes.carve_if_unsure(engine, image, "what digit is red", threshold=1.0)
    assert unsure.carved is not None and unsure.confidence == pytest.approx(sure.confidence)
    assert unsure.answer == unsure.carved.refined_answer == expected.refined_answer and unsure.plain == expected.answer
    assert torch.equal(unsure.carved.saliency, expected.saliency)
    quick = CarveEngine(model, processor, preset={"max_new_tokens": 5}, memory=False, profile=False, plain=False)
    found = recipes.carve_if_unsure(quick, image, "what digit is red", threshold=1.0)
    assert found.answer == expected.refined_answer and found.carved is not None
    assert found.carved.answer == found.plain == expected.answer and found.carved.answer_ids == expected.answer_ids


def test_the_answer_is_of_the_models_generation_config(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores are those behind its penalties, and its stop strings end the answer, as in the engine."""
    model, processor = pair("llava")
    image = draw_scene(3, 4).image.resize((120, 90))
    engine = CarveEngine(model, processor, preset={"max_new_tokens": 6}, memory=False, profile=False)
    before = recipes.carve_if_unsure(engine, image, "what digit is red", threshold=0.0)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)
    monkeypatch.setattr(model.generation_config, "temperature", 0.3)
    monkeypatch.setattr(model.generation_config, "stop_strings", [engine(image, "what digit is red").answer[0]])
    expected = engine(image, "what digit is red")
    found = recipes.carve_if_unsure(engine, image, "what digit is red", threshold=0.0)
    assert found.plain == expected.answer and found.confidence != pytest.approx(before.confidence, rel=1e-3)
    assert len(expected.answer_ids) < 6 and not caplog.records


def test_the_embedded_model_is_less_sure_of_wrong_answers() -> None:
    engine = CarveEngine(*embedded(), plain=False, memory=False)
    scenes = [draw_scene(seed, 4, split="test") for seed in range(12)]
    found = [recipes.carve_if_unsure(engine, scene.image, scene.question, threshold=0.9) for scene in scenes]
    right = [answer.plain == scene.answer for answer, scene in zip(found, scenes, strict=True)]
    sure = np.array([answer.confidence for answer in found])
    assert 2 < sum(right) < 10 and sure[right].mean() > sure[np.logical_not(right)].mean() + 0.05
    assert [answer.carved is None for answer in found] == (sure >= 0.9).tolist() and 2 < (sure >= 0.9).sum() < 10
    assert sum(answer.answer == scene.answer for answer, scene in zip(found, scenes, strict=True)) > sum(right)


# Several peaks.


def test_two_planted_peaks_in_windows_of_whole_tokens() -> None:
    saliency = torch.full((8, 10), 0.01)
    saliency[1:3, 1:3] = 1.0
    saliency[5:7, 7:9] = 0.9
    saliency[5:7, 1:3] = 0.5  # below the share
    found = recipes.peak_boxes(saliency, (160, 300), (40, 60))
    assert found == [(30, 20, 90, 60), (210, 100, 270, 140)]
    assert recipes.peak_boxes(saliency, (160, 300), (40, 60), count=5, share=0.4)[2:3] == [(30, 100, 90, 140)]
    assert recipes.peak_boxes(saliency, (160, 300), (40, 60), count=1) == found[:1]
    assert recipes.peak_boxes(saliency.tolist(), (161, 303), (41, 61), count=1) == [(30, 20, 91, 60)]
    assert recipes.peak_boxes(saliency, (160, 300), 1000) == [(0, 0, 300, 160)]
    assert recipes.peak_boxes(torch.ones(8, 10), (160, 300), (40, 60)) == []
    assert recipes.peak_boxes(torch.zeros(8, 10), (160, 300), 1000) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "columns"), [(7, 11), (12, 12), (1, 9)])
def test_peaks_equal_a_search_by_hand(rows: int, columns: int, seed: int) -> None:
    saliency = np.random.default_rng(seed).random((rows, columns)) ** 6
    down, across = min(3, rows), 4
    windows = {
        (row, column): saliency[row : row + down, column : column + across].sum()
        for row, column in product(range(rows - down + 1), range(columns - across + 1))
    }
    most = max(windows.values())
    kept: list[tuple[int, int]] = []
    for place in sorted(windows, key=lambda place: -windows[place]):
        if windows[place] < 0.5 * most or len(kept) == 3:
            break
        if all(shared(place, other, down, across) < 0.25 for other in kept):
            kept.append(place)
    found = recipes.peak_boxes(
        saliency, (rows * 10, columns * 10), (down * 10, across * 10), count=3, share=0.5, overlap=0.25
    )
    assert found == [(x * 10, y * 10, (x + across) * 10, (y + down) * 10) for y, x in kept]
    assert len(found) > 1 or rows == 1


def shared(one: tuple[int, int], other: tuple[int, int], down: int, across: int) -> float:
    """The intersection over union of two windows."""
    cells = [set(product(range(y, y + down), range(x, x + across))) for y, x in (one, other)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def test_what_they_give_can_be_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SMALL))
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--scenes", "10", "--validation", "3", "--levels", "4"])
    before = set(sys.modules)
    try:
        runpy.run_path(str(SMALL / "recipes.py"), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(SMALL)):
                del sys.modules[name]
    table = dict(re.findall(r"^\| ([a-z_(][^|]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M))
    assert len(table) == 11
    shares = {name: float(share) for name, share in table.items()}
    assert min(shares["concentrated heads"], shares["grounding heads"], shares["query_layer"]) > shares["last layer"]
    assert shares["profile, if unsure"] > shares["plain"] and 0 < shares["(answers that were unsure)"] < 100


# Errors name the argument.

MAPS, INSIDE, SCORES = torch.full((2, 3, 6), 0.1), [True] * 6, torch.zeros(2, 5)
WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "no tensor": (TypeError, "task: expected a tensor, a NumPy array or a list", lambda: two("x", MAPS)),
    "ragged": (ValueError, r"task\[0\]\[1\]: expected shape", lambda: two([[[0.1, 0.2], [0.1]]], MAPS)),
    "shape": (ValueError, r"task: expected maps \[L, A, N\]", lambda: two(MAPS[0], MAPS)),
    "integers": (TypeError, "task: expected dtype", lambda: two(MAPS.long(), MAPS)),
    "half": (TypeError, "without: expected dtype", lambda: two(MAPS, MAPS.half())),
    "other shape": (ValueError, r"without: expected shape \[2, 3, 6\]", lambda: two(MAPS, MAPS[:1])),
    "NaN": (ValueError, "without: expected finite values", lambda: two(MAPS, MAPS * math.nan)),
    "negative": (ValueError, "task: expected attention, which is never negative", lambda: two(-MAPS, MAPS)),
    "heads": (ValueError, "heads: expected an integer from 1 to 3", lambda: two(MAPS, MAPS, heads=4)),
    "heads float": (TypeError, "heads: expected an integer", lambda: two(MAPS, MAPS, heads=1.0)),
    "grid": (ValueError, "maps: expected 2 x 4 tokens last", lambda: recipes.spatial_entropy(MAPS, (2, 4))),
    "grid type": (TypeError, "grid: expected a pair", lambda: scattered(MAPS, 6)),
    "scalar": (ValueError, "maps: expected 2 x 3 tokens", lambda: recipes.spatial_entropy(MAPS[0, 0, 0], (2, 3))),
    "mass": (ValueError, "mass: expected a number from", lambda: recipes.concentrated_heads(MAPS, (2, 3), mass=2)),
    "count": (ValueError, "count: expected an integer", lambda: recipes.concentrated_heads(MAPS, (2, 3), count=0)),
    "no prompts": (ValueError, "maps: expected those of at least one", lambda: recipes.grounding_heads([], [])),
    "prompts": (ValueError, "inside: expected the tokens of each of 1", lambda: recipes.grounding_heads([MAPS], [])),
    "inside": (ValueError, r"inside\[0\]: expected shape \[6\]", lambda: at([MAPS], [INSIDE[:3]])),
    "inside type": (TypeError, r"inside\[0\]: expected dtype torch.bool", lambda: at([MAPS], [[1.0] * 6])),
    "prompts differ": (ValueError, r"maps\[1\]: expected \[2, 3\] heads", lambda: at([MAPS, MAPS[:1]], [INSIDE] * 2)),
    "maps no list": (TypeError, "maps: expected a list", lambda: at(3, [INSIDE])),
    "a number": (TypeError, "inside: expected a list", lambda: at([MAPS], torch.tensor(True))),
    "pairs": (TypeError, r"choices\[0\]: expected pairs", lambda: frequent([[3]])),
    "pair of text": (
        TypeError,
        r"choices\[0\]\[1\]: expected an integer",
        lambda: frequent([[(3, "a")]]),
    ),
    "choices": (TypeError, "choices: expected a list", lambda: frequent(3)),
    "scores": (
        ValueError,
        r"scores: expected floating-point scores \[T, V\]",
        lambda: recipes.confidence(SCORES[0], [0]),
    ),
    "no scores": (ValueError, "scores: expected floating-point scores", lambda: recipes.confidence((), [])),
    "scores NaN": (ValueError, "scores: expected numbers", lambda: recipes.confidence(SCORES * math.nan, [0, 1])),
    "scores of a batch": (
        ValueError,
        "scores: expected floating-point scores",
        lambda: recipes.confidence((SCORES, SCORES), [0, 1, 0, 1]),
    ),
    "ids": (ValueError, "ids: expected 2 tokens as the scores", lambda: recipes.confidence(SCORES, [0])),
    "ids float": (ValueError, "ids: expected 2 tokens as the scores", lambda: recipes.confidence(SCORES, [0.0, 1.0])),
    "ids high": (ValueError, "ids: expected tokens from 0 to 4", lambda: recipes.confidence(SCORES, [0, 5])),
    "engine": (TypeError, "engine: expected a CarveEngine", lambda: unsure(engine=3)),
    "threshold": (ValueError, "threshold: expected a number from 0.0 to 1.0", lambda: unsure(threshold=1.5)),
    "threshold NaN": (ValueError, "threshold: expected a finite number", lambda: unsure(threshold=math.nan)),
    "several images": (TypeError, "image: expected one path or PIL image", lambda: unsure(image=["a.png"])),
    "question": (TypeError, "question: expected a string", lambda: unsure(question=3)),
    "saliency": (ValueError, r"saliency: expected a map \[GH, GW\]", lambda: recipes.peak_boxes(MAPS, (9, 9), 3)),
    "saliency NaN": (ValueError, "saliency: expected finite", lambda: peaks(saliency=MAPS[0] / 0)),
    "size": (TypeError, "size: expected a pair", lambda: peaks(size=9)),
    "window": (ValueError, r"window: expected at least the \(4, 2\) pixels", lambda: peaks(window=(3, 3))),
    "window type": (TypeError, r"window: expected a pair", lambda: peaks(window="3")),
    "window negative": (ValueError, r"window\[0\]: expected an integer of at least 1", lambda: peaks(window=-3)),
    "share": (ValueError, r"share: expected a number in \(0, 1\]", lambda: peaks(share=0)),
    "overlap": (ValueError, "overlap: expected a number of at most 1.0", lambda: peaks(overlap=2)),
}


def two(*given: Any, **options: Any) -> Any:
    return recipes.query_layer(*given, **options)


def scattered(maps: Any, grid: Any) -> Any:
    return recipes.spatial_entropy(maps, grid)


def frequent(choices: Any) -> Any:
    return recipes.frequent_heads(choices)


def at(maps: Any, inside: Any) -> Any:
    return recipes.grounding_heads(maps, inside)


def peaks(**options: Any) -> Any:
    given = {"saliency": MAPS[0], "size": (12, 12), "window": (6, 6), **options}
    return recipes.peak_boxes(**given)


def unsure(**options: Any) -> Any:
    model, processor = pair("llava")
    given: dict[str, Any] = {
        "engine": None,
        "image": draw_scene(0, 1).image,
        "question": "x",
        "threshold": 0.5,
        **options,
    }
    if given["engine"] is None:
        given["engine"] = CarveEngine(model, processor, profile=False)
    return recipes.carve_if_unsure(**given)


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_argument(name: str) -> None:
    error, message, call = WRONG[name]
    with pytest.raises(error, match=f"^{message}"):
        call()
