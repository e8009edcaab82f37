"""contrast, regions and saliency at 1024 x 1024 pixels against plain torch and the steps of the release."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy
import torch

from benchmarks import bench_pixels, roofline
from benchmarks.bench_pixels import CONTRAST, FILL, FLOOR, GRID, KEEP, LAM, REGIONS, RELEASE, STEPS_OF_RELEASE, TORCH
from benchmarks.gpu import predicted_regions
from benchmarks.gpu.timing import Clock, in_graph, microseconds
from benchmarks.support.answers import WrongAnswer, check_maps
from benchmarks.support.lines import Goal, Line, line, over
from benchmarks.support.timing import Run, no_preparation, paired
from carve_kernels import contrast, regions, saliency
from carve_kernels.backends.cuda import regions as compiled
from carve_kernels.selfcheck.planted import Case, planted
from carve_kernels.selfcheck.roofline import gpu_of, predict
from carve_kernels.types import RegionOptions

SALIENCY, WITH_REGIONS = "saliency", "saliency with regions"
# As roofline.saliencies counts them; a small side is for a quick run.
HEADS, KEY_HEADS, HEAD_SIZE, KEYS, QUICK_KEYS = 28, 4, 128, 4096, 1200
# A hundredth of a decode step of a 7B on an H100 (results/predicted.md).
MOST_US = 47.7


def measure(side: int, clock: Clock) -> Iterator[Line]:
    yield from _contrast(side, clock)
    smooth = contrast(*bench_pixels.maps(), (GRID, GRID), (side, side), lam=LAM)
    noise, larger = (torch.rand(n, n, generator=torch.Generator().manual_seed(1)) for n in (side, 2 * side))
    for name, image in (("smooth", smooth), ("white noise", noise)):
        yield _regions(name, image, clock)
    if clock.device.type == "cuda":
        for name, image in (("smooth", smooth), ("white noise", noise), ("white noise", larger)):
            yield regions_in_graph(name, image, clock)
    yield _saliency(side, clock)


def _saliency(side: int, clock: Clock) -> Line:
    """A heat map of a token, as a CUDA graph replays it beside a decode step."""
    keys = KEYS if side >= roofline.SIDE else QUICK_KEYS
    case = Case(
        batch=1, query_heads=HEADS, key_heads=KEY_HEADS, rows=1, keys=keys, size=HEAD_SIZE, tokens=GRID**2,
        dtype=torch.bfloat16, view="all", ragged=False, gain=1.0,
    )  # fmt: skip
    given = [planted(case.but(seed=seed)) for seed in range(bench_pixels.LAYERS)]
    queries, caches = ([arguments[index].contiguous() for arguments, _ in given] for index in (0, 1))
    first = (keys - case.tokens) // 2
    tokens = torch.arange(first, first + case.tokens, dtype=torch.int32)[None]
    general = bench_pixels.maps()[1][:, :1]
    shared = {"scale": given[0][1]["scale"], "lam": "mean"}
    truth = saliency(queries, caches, tokens, general, (GRID, GRID), (side, side), **shared, backend="reference")
    there = [[one.to(clock.device) for one in each] for each in (queries, caches)]
    arguments = (*there, tokens.to(clock.device), general.to(clock.device), (GRID, GRID), (side, side))
    runs: dict[str, Run] = {}
    for name, options in ((SALIENCY, {}), (WITH_REGIONS, {"regions": {"keep": KEEP, "floor": FLOOR}})):
        memory = saliency(*arguments, **shared, **options)
        check_maps(name, memory.pixels.cpu(), truth.pixels, relative=2e-2, correlation=1 - 1e-4)
        runs[name] = partial(saliency, *arguments, **shared, **options, out=memory, check=False)
    graphs = {name: in_graph(run, clock.device) for name, run in runs.items()}
    seconds = clock.replayed(graphs)
    labels = {"layers": len(queries), "keys": keys, "tokens": case.tokens, "pixels": f"{side} x {side}", "how": "graph"}
    times = {name: microseconds(spent) for name, spent in seconds.items()}
    goals = [Goal(name, MOST_US, most=True) for name in times] if side >= roofline.SIDE else []
    return line("saliency of one token: us", labels, times, goals, seconds=seconds)


def _contrast(side: int, clock: Clock) -> Iterator[Line]:
    task, general = bench_pixels.maps()
    truth = bench_pixels.resized_by_pillow(task, general, side)
    if float(truth.max() / truth.median()) < 2:
        raise WrongAnswer(f"{RELEASE}: expected a saliency with a peak of 2 medians, got a flat one")
    here = task.to(clock.device), general.to(clock.device)
    result = torch.empty(side, side, device=clock.device)
    runs: dict[str, Run] = {
        CONTRAST: lambda: contrast(*here, (GRID, GRID), (side, side), lam=LAM),
        TORCH: lambda: bench_pixels.composed(*here, side),
        FILL: lambda: result.fill_(1.0),
    }
    for name in (CONTRAST, TORCH):
        check_maps(name, runs[name]().cpu(), truth, relative=1e-4, correlation=1 - 1e-6)
    graphs = {name: in_graph(run, clock.device) for name, run in runs.items()}
    size = {"maps": f"{task.shape[0]} x {task.shape[1]} x {task.shape[2]}", "pixels": f"{side} x {side}"}
    for how, seconds in (("graph", clock.replayed(graphs)), ("launched", clock.launched(runs))):
        labels = {**size, "least, us": _least("contrast", side, clock.device, graphs=how == "graph"), "how": how}
        # Twice a fill in a graph; the host is not what is compared with a fill.
        goals = [Goal(TORCH, 1), *([Goal(FILL, 0.5)] if how == "graph" else [])]
        yield line("contrast: ms, and times contrast", labels, over(seconds, CONTRAST), goals, seconds=seconds)


def _regions(name: str, image: torch.Tensor, clock: Clock) -> Line:
    array, here = image.numpy(), image.to(clock.device)
    runs: dict[str, Run] = {REGIONS: lambda: regions(here, keep=KEEP, floor=FLOOR)}
    found, (mask, boxes) = runs[REGIONS](), bench_pixels.cut(array)
    if not mask.any() or mask.all():
        raise WrongAnswer(f"{STEPS_OF_RELEASE}, {name}: expected a mask with an inside and an outside, got one of them")
    if not numpy.array_equal(found.mask.cpu().numpy(), mask):
        raise WrongAnswer(f"{REGIONS}, {name}: expected the mask of {STEPS_OF_RELEASE}, got another")
    # Regions of equal sums may be ordered differently.
    if sorted(found.boxes.tolist()) != sorted(boxes):
        raise WrongAnswer(f"{REGIONS}, {name}: expected the boxes of {STEPS_OF_RELEASE}, got others")
    seconds = clock.called(runs)
    seconds |= paired({STEPS_OF_RELEASE: lambda: bench_pixels.cut(array)}, rounds=3, before=no_preparation)
    labels = {"saliency": name, "pixels": f"{array.shape[0]} x {array.shape[1]}"}
    labels["least of its kernels, us"] = _least("regions", array.shape[0], clock.device, graphs=False)
    return line("regions, from the call to the boxes: ms", labels, {}, [], seconds=seconds)


def regions_in_graph(name: str, saliency: torch.Tensor, clock: Clock) -> Line:
    """The kernels alone, replayed from a graph, with the memory of one call."""
    here, options = saliency.to(clock.device), RegionOptions(KEEP, floor=FLOOR)
    scratch, buffers = compiled.memory(here, options)
    run = in_graph(lambda: compiled.launch(here, options, scratch, buffers), clock.device)
    run()
    found, wanted = compiled.read(buffers), regions(saliency, keep=KEEP, floor=FLOOR, backend="reference")
    if not torch.equal(found.mask.cpu(), wanted.mask) or not torch.equal(found.boxes, wanted.boxes):
        raise WrongAnswer(f"{REGIONS} in a graph, {name}: expected the regions of the reference, got others")
    seconds = clock.replayed({"graph": run})
    side = saliency.shape[0]
    foretold = predicted_regions.seconds(name, side)
    labels = {
        "saliency": name,
        "pixels": f"{side} x {side}",
        "predicted on an H100, us": "-" if foretold is None else f"{1e6 * foretold:.0f}",
    }
    goal = predicted_regions.GOALS.get((name, side))
    goals = [] if goal is None else [Goal("us", goal, most=True)]
    return line("regions in a graph", labels, {"us": microseconds(seconds["graph"])}, goals, seconds=seconds)


def _least(stage: str, side: int, device: torch.device, *, graphs: bool) -> str:
    """The roofline's microseconds of a stage on this GPU."""
    gpu = gpu_of(torch.cuda.get_device_properties(device))
    for cost in roofline.pixels(side) if gpu is not None else ():
        if cost.name.startswith(stage):
            return f"{1e6 * predict(cost.work, gpu, unit=cost.unit, graphs=graphs).seconds:.1f}"
    return "-"
