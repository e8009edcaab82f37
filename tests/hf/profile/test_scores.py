"""The measures of a profile: what they say of planted maps, which of them wins, and which tokens a box has."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from carve_kernels.hf.profile.scores import Cell, Choice, Tally, distance, divergence, score_of, spread, tokens_of
from carve_kernels.types import View

TOKENS = 35
LAST = Choice("last", "t_start")


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, TOKENS, generator=torch.Generator().manual_seed(seed)).square() * 1e-3


def peak(place: int) -> torch.Tensor:
    """Most of the attention on one token."""
    found = torch.full((1, TOKENS), 1e-5)
    found[0, place % TOKENS] = 1e-2
    return found


def view(grid: tuple[int, int], box: tuple[float, float, float, float]) -> View:
    return View(torch.arange(grid[0] * grid[1]), grid, box)


def test_the_measures_are_those_of_scipy() -> None:
    one, other = maps(4, seed=1), maps(4, seed=2)
    for row in range(4):
        own, second = one[row].double().numpy(), other[row].double().numpy()
        assert float(divergence(one, other)[row]) == pytest.approx(entropy(own, second), rel=1e-3)
        assert float(distance(one, other)[row]) == pytest.approx(jensenshannon(own, second, base=2) ** 2, rel=1e-6)
        assert float(spread(one)[row]) == pytest.approx(entropy(own) / math.log(TOKENS), rel=1e-6)
    assert torch.equal(distance(one, other), distance(other, one))


def test_the_measures_read_shapes_and_not_sizes() -> None:
    one, other = maps(3, seed=1), maps(3, seed=2)
    for found, scaled in (
        (divergence(one, other), divergence(one * 7, other / 3)),
        (distance(one, other), distance(one * 7, other / 3)),
        (spread(one), spread(one * 7)),
    ):
        assert torch.allclose(found, scaled, rtol=1e-5)


def test_the_ends_of_the_measures() -> None:
    assert float(distance(peak(3), peak(3))) == pytest.approx(0, abs=1e-12)
    left, right = torch.zeros(1, TOKENS), torch.zeros(1, TOKENS)
    left[0, 3], right[0, 4] = 0.5, 0.25
    assert float(distance(left, right)) == 1
    assert float(spread(left)) == 0
    assert float(spread(torch.full((1, TOKENS), 0.1))) == pytest.approx(1)
    assert float(spread(torch.ones(1, 1))) == 0
    # A general map that is exactly 0 where the question entries is far away, and not infinitely far.
    assert 10 < float(divergence(left, right)) < 40
    assert float(divergence(left, left)) == pytest.approx(0, abs=1e-5)


def tallied(entries: list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]]) -> Cell:
    tally = Tally([7])
    for task, general, others, paraphrases in entries:
        tally.add(LAST, task, general, others, paraphrases)
    (cell,) = tally.cells(len(entries))
    return cell


def test_what_sees_the_question_wins() -> None:
    flat = torch.full((1, TOKENS), 1e-3)
    sees = tallied([(peak(place), flat, [peak(place + 9)], [peak(place)]) for place in range(6)])
    sink = tallied([(peak(0), flat, [peak(0)], [peak(0)]) for _ in range(6)])
    wanders = tallied([(peak(place), flat, [peak(place + 9)], [peak(place + 17)]) for place in range(6)])
    ignores = tallied([(peak(place), peak(place), [peak(place + 9)], [peak(place)]) for place in range(6)])
    blurred = tallied([(flat + peak(place) / 9, flat, [flat + peak(place + 9) / 9], [flat]) for place in range(6)])
    assert sees.score > 0.5
    assert sees.score > 20 * max(abs(cell.score) for cell in (sink, wanders, ignores, blurred))
    assert sink.between == pytest.approx(0, abs=1e-9)
    assert wanders.between == pytest.approx(wanders.within)
    assert sees.score == score_of(sees.departure, sees.entropy, sees.between, sees.within)


def test_one_question_on_an_image_is_held_against_the_general_map() -> None:
    general = peak(20)
    alone = tallied([(peak(3), general, [], [peak(3)])])
    assert alone.between == pytest.approx(float(distance(peak(3), general)))


def test_cells_are_means_over_the_questions_best_first() -> None:
    tally = Tally([0, 2])
    general, worded = maps(2, seed=9), maps(2, seed=8)
    tasks = [maps(2, seed=seed) for seed in range(3)]
    for task in tasks:
        tally.add(LAST, task, general, [], [worded, task])
        inside = torch.zeros(TOKENS, dtype=torch.bool)
        inside[int(task[1].argmax())] = True
        tally.report(LAST, task, general, inside)
    cells = tally.cells(3)
    assert [cell.score for cell in cells] == sorted((cell.score for cell in cells), reverse=True)
    by_layer = {cell.layer: cell for cell in cells}
    for row, layer in enumerate((0, 2)):
        cell = by_layer[layer]
        assert cell.departure == pytest.approx(float(torch.stack([divergence(t, general)[row] for t in tasks]).mean()))
        assert cell.entropy == pytest.approx(float(torch.stack([spread(t)[row] for t in tasks]).mean()))
        halves = [float(distance(task, worded)[row]) / 2 for task in tasks]
        assert cell.within == pytest.approx(sum(halves) / 3)
    assert by_layer[2].pointing == 1
    assert by_layer[2].mass == pytest.approx(float(torch.stack([t[1].max() / t[1].sum() for t in tasks]).mean()))


def test_a_missing_map_drops_the_cell_and_a_missing_question_the_choice() -> None:
    gone = maps(2)
    gone[1] = torch.nan
    tally = Tally([4, 5])
    tally.add(LAST, gone, maps(2, seed=1), [], [maps(2, seed=2)])
    assert [cell.layer for cell in tally.cells(1)] == [4]
    assert tally.cells(2) == []


def brute(boxes: list[tuple[float, float, float, float]], part: View) -> list[bool]:
    rows, columns = part.grid
    x0, y0, x1, y1 = part.box
    wide, high = (x1 - x0) / columns, (y1 - y0) / rows
    found = []
    for place in range(rows * columns):
        left, top = x0 + place % columns * wide, y0 + place // columns * high
        hit = False
        for box in boxes:
            across = max(0.0, min(left + wide, box[2]) - max(left, box[0]))
            down = max(0.0, min(top + high, box[3]) - max(top, box[1]))
            area = (box[2] - box[0]) * (box[3] - box[1])
            hit |= across * down > 0 and across * down >= 0.25 * min(wide * high, area)
        found.append(hit)
    return found


@pytest.mark.parametrize(
    "boxes",
    [
        [(0.0, 0.0, 100.0, 60.0)],
        [(41.0, 13.0, 44.0, 16.0)],
        [(10.0, 5.0, 33.0, 27.0), (90.0, 50.0, 100.0, 60.0)],
        [(-20.0, -20.0, -5.0, -5.0)],
        [],
    ],
)
def test_the_tokens_of_a_box(boxes: list[tuple[float, float, float, float]]) -> None:
    whole, tile = view((5, 7), (0.0, 0.0, 100.0, 60.0)), view((3, 4), (30.0, -7.5, 90.0, 52.5))
    found = tokens_of(boxes, [whole, tile])
    assert found.tolist() == brute(boxes, whole) + brute(boxes, tile)
    assert bool(found.any()) == any(box[2] > 0 for box in boxes)


def test_a_cell_is_ready_for_json_without_what_is_unknown() -> None:
    cell = Cell(3, (-2,), "t_start", 0.123456789, 1.0, 0.5, 0.25, 0.125)
    assert cell.to_dict() == {
        "layer": 3, "rows": (-2,), "steps": "t_start", "score": 0.12346, "departure": 1.0, "entropy": 0.5,
        "between": 0.25, "within": 0.125,
    }  # fmt: skip
