"""contrast and regions at 1024 x 1024 on a CPU against the steps of the release; see `python -m benchmarks cpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy
import torch
from PIL import Image
from scipy import ndimage

from benchmarks.support.answers import WrongAnswer, check_maps
from benchmarks.support.lines import Goal, Line, line, over
from benchmarks.support.timing import Run, paired, warm
from carve_kernels import contrast, regions

LAYERS, STEPS, GRID = 6, 8, 32
KEEP, FLOOR = 0.2, 3
CONTRAST, RELEASE, TORCH, FILL = "contrast", "(d) release", "torch", "(f) fill"
REGIONS, STEPS_OF_RELEASE = "regions", "(e) release"
LAM = 1e-8
# Cells of `measure`: one for contrast, two for regions.
CELLS = 3

Found = tuple[numpy.ndarray, list[list[int]]]


def maps(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Task and general maps [L, T, N]: probabilities of noise, the task's with a bright spot."""
    random = torch.Generator().manual_seed(seed)
    task, general = (torch.randn(LAYERS, STEPS, GRID * GRID, generator=random) for _ in range(2))
    spot = torch.zeros(GRID, GRID)
    spot[GRID // 4 : GRID // 2, GRID // 3 : GRID // 2] = 2.5
    return (task + spot.flatten()).softmax(-1), general.softmax(-1)


def resized_by_pillow(task: torch.Tensor, general: torch.Tensor, side: int) -> torch.Tensor:
    """The release's procedure: the ratio of each layer and step is resized as an image."""
    saliency = numpy.zeros((side, side), dtype=numpy.float64)
    ratios = (task / (general + LAM)).unflatten(-1, (GRID, GRID)).numpy()
    for layer in range(LAYERS):
        for step in range(STEPS):
            ratio = Image.fromarray(ratios[layer, step])
            saliency += (step + 1) * numpy.asarray(ratio.resize((side, side), Image.Resampling.BILINEAR))
    return torch.from_numpy(saliency)


def composed(task: torch.Tensor, general: torch.Tensor, side: int) -> torch.Tensor:
    """The fastest in plain torch: a sum on the grid, then one upsampling."""
    weights = torch.arange(1.0, STEPS + 1, device=task.device)
    fused = torch.einsum("ltn,t->n", task / (general + LAM), weights).view(1, 1, GRID, GRID)
    return torch.nn.functional.interpolate(fused, (side, side), mode="bilinear", antialias=True)[0, 0]


def cut(saliency: numpy.ndarray) -> Found:
    """The release's steps: percentile, labels, sums, the best regions, their mask and boxes."""
    labels, count = ndimage.label(saliency >= numpy.percentile(saliency, 100 * (1 - KEEP)))
    sums = ndimage.sum(saliency, labels, range(1, count + 1))
    selected = numpy.argsort(sums)[::-1][: max(FLOOR, int(count * KEEP))] + 1
    mask = numpy.isin(labels, selected)
    slices = ndimage.find_objects(labels)
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in (slices[label - 1] for label in selected)]
    return mask, boxes


def measure(side: int, threads: int, *, budget: float, advance: Callable[[str], None]) -> Iterator[Line]:
    torch.set_num_threads(threads)
    yield _contrast(side, threads, budget)
    advance("contrast")
    smooth = contrast(*maps(), (GRID, GRID), (side, side), lam=LAM)
    noise = torch.rand(side, side, generator=torch.Generator().manual_seed(1))
    for name, saliency in (("smooth", smooth), ("white noise", noise)):
        yield _regions(name, saliency, threads, budget)
        advance(f"regions, {name}")


def _contrast(side: int, threads: int, budget: float) -> Line:
    task, general = maps()
    result = torch.empty(side, side)
    runs: dict[str, Run] = {
        CONTRAST: lambda: contrast(task, general, (GRID, GRID), (side, side), lam=LAM),
        TORCH: lambda: composed(task, general, side),
        FILL: lambda: result.fill_(1.0),
        RELEASE: lambda: resized_by_pillow(task, general, side),
    }
    truth = runs[RELEASE]()
    if float(truth.max() / truth.median()) < 2:
        raise WrongAnswer(f"{RELEASE}: expected a saliency with a peak of 2 medians, got a flat one")
    for name in (CONTRAST, TORCH):
        check_maps(name, runs[name](), truth, relative=1e-4, correlation=1 - 1e-6)
    seconds = paired(
        {name: run for name, run in runs.items() if name != RELEASE}, rounds=301, before=warm, budget=budget
    )
    pair = paired({name: runs[name] for name in (CONTRAST, RELEASE)}, rounds=15, before=warm, budget=2 * budget)
    goals = [Goal(RELEASE, 100), Goal(TORCH, 3), Goal(FILL, 0.25)]
    labels = {"maps": f"{LAYERS} x {STEPS} x {GRID**2}", "pixels": f"{side} x {side}", "threads": threads}
    ratios = over(seconds, CONTRAST) | over(pair, CONTRAST)
    return line("contrast: ms, and times contrast", labels, ratios, goals, seconds={**seconds, RELEASE: pair[RELEASE]})


def _regions(name: str, saliency: torch.Tensor, threads: int, budget: float) -> Line:
    array = saliency.numpy()
    runs: dict[str, Run] = {
        REGIONS: lambda: regions(saliency, keep=KEEP, floor=FLOOR),
        STEPS_OF_RELEASE: lambda: cut(array),
    }
    found, (mask, boxes) = runs[REGIONS](), runs[STEPS_OF_RELEASE]()
    if not mask.any() or mask.all():
        raise WrongAnswer(f"{STEPS_OF_RELEASE}, {name}: expected a mask with an inside and an outside, got one of them")
    if not numpy.array_equal(found.mask.numpy(), mask):
        raise WrongAnswer(f"{REGIONS}, {name}: expected the mask of {STEPS_OF_RELEASE}, got another")
    # Regions of equal sums may be ordered differently.
    if sorted(found.boxes.tolist()) != sorted(boxes):
        raise WrongAnswer(f"{REGIONS}, {name}: expected the boxes of {STEPS_OF_RELEASE}, got others")
    seconds = paired(runs, rounds=101, before=warm, budget=2 * budget)
    labels = {"saliency": name, "pixels": f"{array.shape[0]} x {array.shape[1]}", "threads": threads}
    goals = [Goal(STEPS_OF_RELEASE, 8)]
    return line("regions: ms, and times regions", labels, over(seconds, REGIONS), goals, seconds=seconds)
