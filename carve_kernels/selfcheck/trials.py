"""The trials of a backend, each with its answer: small ones for every path of a kernel, large ones to time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from carve_kernels.backends.reference.attention import attend
from carve_kernels.ops.attention import attention
from carve_kernels.ops.capture import capture, capture_layers
from carve_kernels.ops.column_sums import column_sums
from carve_kernels.ops.contrast import contrast
from carve_kernels.ops.regions import regions
from carve_kernels.selfcheck.judging import Verdict, attended, captures, close, identical, roundings, worst
from carve_kernels.selfcheck.planted import Case, exact, maps, planted, planted_value, poisoned
from carve_kernels.types import Capture, CaptureOptions, Size


class Trial(NamedTuple):
    """A call of a public function on CPU tensors, and the judge of its result; a trial with `sizes` is also timed."""

    stage: str
    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    judge: Callable[[Any], Verdict]
    sizes: dict[str, Any] | None = None


Build = Callable[[], Trial]

_HALF, _SINGLE = torch.bfloat16, torch.float32
_SIZES = (32, 40, 64, 72, 80, 96, 128, 192, 256)
_BASE = Case(keys=301, tokens=67)
_CASES = {
    "one row": _BASE.but(rows=1, view="all"),
    "eight rows": _BASE.but(rows=8, view="positions"),
    "nine rows": _BASE.but(rows=9, view="positions"),
    "sixty-four rows": _BASE.but(rows=64, view="positions", keys=515),
    "mask, padding": _BASE,
    "a mask for each head": _BASE.but(view="head mask"),
    "window": _BASE.but(view="positions", window=23),
    "softcap": _BASE.but(softcap=2.5),
    "sinks": _BASE.but(sink=True),
    "sinks, softcap, window": _BASE.but(sink=True, softcap=4.0, view="positions", window=31, rows=2),
    "no groups": _BASE.but(query_heads=3, key_heads=3, size=128),
    "groups of seven": _BASE.but(query_heads=28, key_heads=4, size=128, rows=1),
    "one key": _BASE.but(keys=1, tokens=1, view="all", ragged=False),
    "no token": _BASE.but(tokens=0, ragged=False),
    "long": _BASE.but(batch=1, rows=1, keys=9001, tokens=4003, query_heads=8, size=128, view="all", gain=1.0),
}
_QUICK = ("one row", "nine rows", "mask, padding", "sinks, softcap, window")
# Attention of decode steps: the cases above with one row, and the head size of the values.
_ATTENDED = {
    "one row": 64, "mask, padding": 64, "sinks, softcap, window": 64, "a mask for each head": 72, "window": 40,
    "softcap": 64, "sinks": 256, "no groups": 128, "groups of seven": 128, "one key": 8, "no token": 64, "long": 96,
}  # fmt: skip


def trials(*, quick: bool) -> list[Build]:
    """Every trial, built when it is called: together the large ones fill a gigabyte."""
    dtypes = (_SINGLE, _HALF) if quick else (_SINGLE, _HALF, torch.float16)
    cases = {name: _CASES[name] for name in _QUICK} if quick else _CASES
    builds: list[Build] = [
        partial(_capture, f"{name}, {str(dtype).removeprefix('torch.')}", case.but(dtype=dtype))
        for name, case in cases.items()
        for dtype in dtypes
    ]
    if not quick:
        builds += [
            partial(_capture, f"head size {size}, {rows} rows, bfloat16", _BASE.but(size=size, rows=rows, dtype=_HALF))
            for size in _SIZES
            for rows in (1, 12)
        ]
    builds += [
        partial(_attention, f"{name}, {str(dtype).removeprefix('torch.')}", _CASES[name].but(rows=1, dtype=dtype), size)
        for name, size in _ATTENDED.items()
        for dtype in (_HALF, torch.float16)
        if name in _QUICK or not quick
    ]
    builds += [
        partial(_capture, "each head", _BASE.but(dtype=_HALF), heads="each"),
        partial(_capture, "known lse", _BASE.but(view="all", ragged=False), lse=True),
        partial(_layers, "three layers", _BASE.but(rows=2, dtype=_HALF, view="positions"), 3),
        *(partial(_column_sums, name, case) for name, case in cases.items() if case.keys < 1000),
        partial(_column_sums, "known lse", _BASE.but(view="all", ragged=False), lse=True),
        partial(_column_sums, "forty rows, bfloat16", _BASE.but(dtype=_HALF, rows=40, view="positions")),
        *_contrasts(quick),
        *_regions(quick),
    ]
    return builds + _timed(quick)


def _timed(quick: bool) -> list[Build]:
    """Six layers of Qwen2.5-VL-7B and of LLaVA-1.5-7B, a saliency of a million pixels; or small ones."""
    qwen = Case(batch=1, query_heads=28, key_heads=4, size=128, dtype=_HALF, ragged=False, gain=1.0)
    shapes = [(qwen, 300, 1), (qwen, 300, 9)] if quick else [(qwen, 4096, rows) for rows in (1, 8, 32)]
    if not quick:
        shapes += [(qwen, 32768, 1), (qwen.but(query_heads=32, key_heads=32), 4096, 1)]
    side, grid = (96, 9) if quick else (1024, 32)
    builds: list[Build] = []
    for case, keys, rows in shapes:
        view = "all" if rows == 1 else "positions"
        name = f"6 layers, {case.query_heads} on {case.key_heads} heads, {keys} keys, {rows} rows"
        case = case.but(keys=keys, rows=rows, tokens=keys * 4 // 5, view=view)
        builds.append(partial(_layers, name, case, 6, timed=True))
        if rows == 1:
            name = f"one layer, {case.query_heads} on {case.key_heads} heads, {keys} keys"
            builds.append(partial(_attention, name, case, case.size, timed=True))
    pixels = f"{side} x {side} pixels"
    return [
        *builds,
        partial(_contrast, f"6 x 8 maps on {pixels}", (grid, grid), (side, side), 6, 8, timed=True),
        partial(_saliency, f"a saliency of {pixels}", (side, side), "smooth", timed=True),
    ]


def _capture(name: str, case: Case, heads: Literal["mean", "each"] = "mean", lse: bool = False) -> Trial:
    arguments, options = planted(case)
    if lse:
        options["lse"] = _log_sum_exp(arguments[0], arguments[1], options["scale"])
    options["heads"] = heads
    reference, truth = _answers(arguments, options)
    options["out"] = poisoned(case, heads)
    judge = partial(captures, reference=reference, truth=truth, slack=_slack(case))
    return Trial("capture", name, capture, arguments, options, judge)


def _answers(arguments: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> tuple[Capture, Capture]:
    """The reference's captures in the dtype of the arguments, and in float64."""
    exact_arguments, exact_options = exact(arguments, options)
    truth = capture(*exact_arguments, **exact_options, backend="reference")
    return capture(*arguments, **options, backend="reference"), truth


def _layers(name: str, case: Case, layers: int, timed: bool = False) -> Trial:
    """Several layers into one step of buffers; their other layers and steps must not change."""
    problems = [planted(case.but(seed=seed)) for seed in range(layers)]
    tokens, options = problems[0][0][2], problems[0][1]
    if timed:
        # As in a model: dense keys, the tokens of one image in a row, captured rows at the end.
        first = (case.keys - case.tokens) // 2
        tokens = torch.arange(first, first + case.tokens, dtype=torch.int32)[None]
        if case.rows > 1:
            options["positions"] = torch.arange(case.keys - case.rows, case.keys)[None]
    pairs = [(query, key.contiguous() if timed else key) for (query, key, _), _ in problems]
    answers = zip(*(_answers((query, key, tokens), options) for query, key in pairs), strict=True)
    reference, truth = (Capture(*map(torch.stack, zip(*each, strict=True))) for each in answers)
    judge = partial(_slots, reference=reference, truth=truth, slack=_slack(case))
    arguments = [query for query, _ in pairs], [key for _, key in pairs], tokens
    options |= {"step": torch.tensor(1), "first": 1, "out": poisoned(case, lead=(2, layers + 2))}
    names = ("query_heads", "key_heads", "rows", "keys", "size", "tokens")
    sizes = {name: getattr(case, name) for name in names}
    sizes |= {"layers": layers, "batch": 1, "element_bytes": case.dtype.itemsize}
    return Trial("capture", name, _into, arguments, options, judge, sizes if timed else None)


def _into(*arguments: Any, out: Capture, **options: Any) -> Capture:
    capture_layers(*arguments, out=out, **options)
    return out


def _slots(result: Capture, reference: Capture, truth: Capture, slack: float) -> Verdict:
    layers = len(truth.mass)
    verdict = captures(Capture(*(buffer[1, 1 : 1 + layers] for buffer in result)), reference, truth, slack)
    others = [other for buffer in result for other in (buffer[0], buffer[1, 0], buffer[1, -1])]
    is_untouched = all(bool(other.isnan().all()) for other in others)
    return verdict if is_untouched else Verdict("out: a slot of another step or layer was written", float("inf"), 0.0)


def _attention(name: str, case: Case, value_size: int, timed: bool = False) -> Trial:
    """One row attends, and is captured; the output is the transpose of a dense one, as in a model."""
    (query, key, tokens), options = planted(case)
    value = planted_value(case, value_size, options)
    if timed:
        key, value = key.contiguous(), value.contiguous()
        first = (case.keys - case.tokens) // 2
        tokens = torch.arange(first, first + case.tokens, dtype=torch.int32)[None]
    (doubled, doubled_key, _), exact_options = exact((query, key, tokens), options)
    truth = attention(doubled, doubled_key, value.double(), tokens, **exact_options, backend="reference")
    sizes = attend(doubled, doubled_key, value.double().abs(), CaptureOptions(**exact_options))
    reference = attention(query, key, value, tokens, **options, backend="reference")
    output = torch.full((case.batch, 1, case.query_heads, value_size), torch.nan, dtype=case.dtype).transpose(1, 2)
    options |= {"output": output, "out": poisoned(case)}
    judge = partial(attended, reference=reference, truth=truth, sizes=sizes, slack=_slack(case))
    names = ("batch", "query_heads", "key_heads", "keys", "size", "tokens")
    numbers: dict[str, Any] = {one: getattr(case, one) for one in names}
    numbers |= {"value_size": value_size, "span": case.tokens, "seeks_span": True}
    return Trial("attention", name, attention, (query, key, value, tokens), options, judge, numbers if timed else None)


def _column_sums(name: str, case: Case, lse: bool = False) -> Trial:
    (query, key, _), options = planted(case)
    if lse:
        options["lse"] = _log_sum_exp(query, key, options["scale"])
    (doubled, doubled_key, _), exact_options = exact((query, key, query), options)
    truth = column_sums(doubled, doubled_key, **exact_options, backend="reference")
    reference = column_sums(query, key, **options, backend="reference")
    judge = partial(close, "sums", reference=reference, truth=truth, slack=_slack(case) + roundings(case.rows))
    return Trial("column_sums", name, column_sums, (query, key), options, judge)


def _contrasts(quick: bool) -> list[Build]:
    views: list[tuple[Any, Any, int, int]] = [((7, 5), (61, 83), 3, 2), ((18, 32), (13, 17), 2, 3)]
    if not quick:
        views += [((5, 11), (5, 11), 1, 1), ((9, 4), (3, 67), 4, 1), ((24, 24), (336, 335), 6, 8)]
        views += [([(3, 5), (4, 3)], [(17, 9), (2, 31)], 2, 2)]
    normalisations: list[tuple[str, float | str]] = [("none", "mean"), ("sum", 0.0), ("max", 1e-8), ("minmax", 0.01)]
    return [
        partial(_contrast, f"{grid} on {size}, {normalize}, lam {lam}", grid, size, layers, steps, normalize, lam)
        for grid, size, layers, steps in views
        for normalize, lam in normalisations
    ]


def _contrast(
    name: str, grid: Any, size: Any, layers: int, steps: int, normalize: str = "none", lam: Any = "mean",
    timed: bool = False,
) -> Trial:  # fmt: skip
    several = isinstance(grid, list)
    tokens = sum(rows * columns for rows, columns in grid) if several else grid[0] * grid[1]
    task, general = maps((1, tokens) if several else grid, layers=layers, steps=steps)
    options: dict[str, Any] = {"lam": lam, "normalize": normalize}
    truth = contrast(task.double(), general.double(), grid, size, **options, backend="reference")
    reference = contrast(task, general, grid, size, **options, backend="reference")
    offset = 0.0
    if normalize == "minmax":
        # A subtraction makes the lowest value 0: errors are relative to what was subtracted.
        line = (1, tokens)
        fused = contrast(task.double(), general.double(), line, line, lam=lam, backend="reference")
        offset = float(fused.min() / (fused.max() - fused.min()))
    judge = partial(_saliencies, reference=reference, truth=truth, offset=offset, slack=roundings(layers * steps + 8))
    sizes = {"layers": layers, "steps": steps, "grid": grid, "size": size}
    return Trial("contrast", name, contrast, (task, general, grid, size), options, judge, sizes if timed else None)


def _saliencies(result: Any, reference: Any, truth: Any, offset: float, slack: float) -> Verdict:
    views = zip(*(maps if isinstance(maps, list) else [maps] for maps in (result, reference, truth)), strict=True)
    return worst(
        [
            close(f"saliency {index}", values + offset, mine + offset, right + offset, slack)
            for index, (values, mine, right) in enumerate(views)
        ]
    )


def _regions(quick: bool) -> list[Build]:
    options: list[dict[str, Any]] = [{"keep": 0.4, "top": 2}]
    options += [{"keep": 0.2, "floor": 3, "connectivity": 8, "score": "mean"}]
    kinds = ("smooth", "noise", "ties") if quick else ("smooth", "noise", "ties", "plateaus", "constant")
    shapes: list[Size] = [(61, 83)] if quick else [(61, 83), (1, 4099), (515, 1), (768, 1021)]
    builds: list[Build] = []
    for kind, shape, chosen in itertools.product(kinds, shapes, options):
        listed = ", ".join(f"{option} {value}" for option, value in chosen.items())
        builds.append(partial(_saliency, f"{kind}, {shape[0]} x {shape[1]}, {listed}", shape, kind, **chosen))
    videos = [(5, 23, 37)] if quick else [(5, 23, 37), (1, 5, 70), (300, 2, 3), (9, 131, 130)]
    for kind, (frames, *shape), connectivity in itertools.product(kinds, videos, (6, 26)):
        name = f"{kind}, {frames} x {shape[0]} x {shape[1]}, connectivity {connectivity}"
        chosen = {"keep": 0.3, "floor": 2, "connectivity": connectivity}
        builds.append(partial(_saliency, name, (shape[0], shape[1]), kind, frames=frames, **chosen))
    builds.append(partial(_saliency, "noise, 61 x 83, min_size 4", (61, 83), "noise", keep=0.3, min_size=4))
    return [*builds, partial(_saliency, "smooth, float64", (61, 83), "smooth", dtype=torch.float64)]


def _saliency(
    name: str,
    shape: Size,
    kind: str,
    dtype: torch.dtype = torch.float32,
    timed: bool = False,
    frames: int | None = None,
    **options: Any,
) -> Trial:
    options = options or {"keep": 0.4, "top": 2}
    saliency = _SALIENCIES[kind]((shape[0] * (frames or 1), shape[1])).to(dtype)
    if frames is not None:
        saliency = saliency.view(frames, *shape)
    truth = regions(saliency, **options, backend="reference")
    sizes = {"height": shape[0], "width": shape[1]}
    judge = partial(identical, truth=truth)
    return Trial("regions", name, regions, (saliency,), options, judge, sizes if timed else None)


def _smooth(shape: Size) -> torch.Tensor:
    task, general = maps((9, 12))
    saliency: torch.Tensor = contrast(task, general, (9, 12), shape, backend="reference")
    return saliency


def _noise(shape: Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


_SALIENCIES: dict[str, Callable[[Size], torch.Tensor]] = {
    "smooth": _smooth,
    "noise": _noise,
    "ties": lambda shape: (2 * _noise(shape)).round(),
    "plateaus": lambda shape: (_noise(shape) > 0.5).float(),
    "constant": lambda shape: torch.full(shape, -3.3),
}


def _log_sum_exp(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    return (scale * query.double() @ key.double().repeat_interleave(group, 1).mT).logsumexp(-1).float()


def _slack(case: Case) -> float:
    # One rounding of a logit of 50 changes its probability by 50 roundings.
    return roundings(case.size + 64 + case.query_heads)
