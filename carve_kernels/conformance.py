"""Does a backend do what the protocol says, and does a frontend call no more than that? Checks for the tests of both.

Every answer is known in another way than by the kernels of this package: from NumPy in float64, or planted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy
import torch

from carve_kernels.checks import BackendUnavailable, describe
from carve_kernels.pipeline import CarveOutcome
from carve_kernels.protocol import METHODS, CarveBackend, mismatch
from carve_kernels.types import Capture, Regions

# Of float32: the largest relative error of a result.
_ERROR = 1e-4
_FORMS: dict[str, Callable[[numpy.ndarray], Any]] = {
    "a torch tensor": torch.from_numpy,
    "a NumPy array": lambda array: array,
    "a list": lambda array: array.tolist(),
}


class NotConforming(ValueError):
    """A backend, or a frontend, that does not do what the protocol says; `faults` has a line for each difference."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(f"{len(faults)} difference(s) from the protocol:\n" + "\n".join(faults))
        self.faults = tuple(faults)


def check(backend: Any, *, model: Any = None, image: Any = None) -> None:
    """Run every check on a backend. Raises NotConforming with all the differences that were found.

    With a `model` that the backend supports, it is loaded and asked about `image` (a PIL image) as well, which takes as
    long as the model does.
    """
    reason = mismatch(backend)
    if reason is not None:
        raise NotConforming([f"the backend {reason}"])
    faults: list[str] = []
    for part in (_members, _maps, _contrast, _views, _regions, _degenerate, _carve, _refusals):
        try:
            faults += part(backend)
        except Exception as error:
            faults.append(f"{part.__name__[1:]}: {type(error).__name__}: {error}")
    if model is not None and not faults:
        faults += _answers(backend, model, image)
    if faults:
        raise NotConforming(faults)


def check_frontend(frontend: Callable[[CarveBackend], Any], backend: CarveBackend | None = None) -> None:
    """Run a frontend on a backend (None: this package's) and watch its calls.

    Raises NotConforming if it calls what the protocol does not have, loads a model without asking whether that is
    supported, calls nothing, or fails, and if the backend is none of this version; TypeError for what is no function.
    """
    if not callable(frontend):
        raise TypeError(f"frontend: expected a function of a backend, got {describe(frontend)}")
    if backend is None:
        from carve_kernels.plugin import backend
    reason = mismatch(backend)
    if reason is not None:
        raise NotConforming([f"the backend {reason}"])
    faults: list[str] = []
    watched = _Watched(backend, faults)
    try:
        frontend(cast(CarveBackend, watched))
    except Exception as error:
        faults.append(f"the frontend failed: {type(error).__name__}: {error}")
    if not watched.called and not faults:
        faults.append("the frontend called nothing of the backend")
    if faults:
        raise NotConforming(faults)


class _Watched:
    """A backend that has nothing but the protocol; other calls are faults."""

    def __init__(self, inner: Any, faults: list[str]) -> None:
        self._inner, self._faults = inner, faults
        self._asked: list[Any] = []
        self.called = False

    def __getattr__(self, name: str) -> Any:
        if name in ("name", "version"):
            return getattr(self._inner, name)
        if name not in METHODS:
            self._faults.append(f"{name}: expected a member of the protocol, got another one")
            raise AttributeError(f"a CarveBackend has no {name!r}")
        signature = inspect.signature(getattr(CarveBackend, name))

        def call(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError as error:
                self._faults.append(f"{name}: expected the arguments of the protocol, got others ({error})")
                raise
            if name == "supports":
                self._asked.append(bound.arguments["model"])
            if name == "load" and not any(bound.arguments["model"] is asked for asked in self._asked):
                self._faults.append("load: expected a call of supports with the model before it, got none")
            return getattr(self._inner, name)(*args, **kwargs)

        return call


def _members(backend: Any) -> Iterator[str]:
    reason = backend.supports(object())
    if not isinstance(reason, str) or not reason:
        yield f"supports: expected a reason for an object that is no model, got {describe(reason)}"
    try:
        loaded = backend.load(object())
    except (TypeError, ValueError, BackendUnavailable):
        return
    yield f"load: expected an error for an object that is no model, got {describe(loaded)}"


def _maps(backend: Any) -> Iterator[str]:
    random = numpy.random.default_rng(1)
    query, key = (random.standard_normal(shape).astype("float32") for shape in ((2, 4, 3, 32), (2, 2, 11, 32)))
    tokens = numpy.array([[1, 2, 3, 7, 9], [0, 5, 6, -1, -1]])
    positions = numpy.array([[8, 9, 10], [4, 6, 10]])
    last = positions[:, None, :, None]
    seen = numpy.arange(11) <= last
    cases: tuple[dict[str, Any], ...] = (
        {}, {"positions": positions}, {"mask": seen}, {"softcap": 1.5}, {"positions": positions, "window": 4},
        {"sink": numpy.array([-1.0, 0.5, 2.0, 4.0], "float32")}, {"heads": "each"},
    )  # fmt: skip
    for options in cases:
        logits = 0.3 * numpy.einsum("bard,basd->bars", query.astype(float), key.repeat(2, 1).astype(float))
        if "softcap" in options:
            logits = options["softcap"] * numpy.tanh(logits / options["softcap"])
        if "positions" in options or "mask" in options:
            logits = numpy.where(seen & (numpy.arange(11) > last - options.get("window", 11)), logits, -numpy.inf)
        sink = options.get("sink", numpy.full(4, -numpy.inf))[None, :, None, None].astype(float)
        weights = numpy.exp(logits) / (numpy.exp(logits).sum(-1, keepdims=True) + numpy.exp(sink))
        used = tokens >= 0
        each = numpy.stack([weights[b][..., tokens[b]] * used[b] for b in range(2)])
        mean = each.mean(1)
        wanted = each if options.get("heads") == "each" else mean
        mass = mean.sum(-1)
        share = mean / numpy.where(mass == 0, 1, mass)[..., None]
        bits = -(share * numpy.log(numpy.where(share > 0, share, 1))).sum(-1)
        entropy = bits / numpy.log(used.sum(-1))[:, None]
        for form, make in _FORMS.items():
            given = [make(array.copy()) for array in (query, key, tokens)]
            arrays = {name: make(value.copy()) for name, value in options.items() if isinstance(value, numpy.ndarray)}
            found = backend.maps(*given, scale=0.3, **{**options, **arrays})
            what = f"maps of {form}{''.join(f' with {name}' for name in options)}"
            if not isinstance(found, Capture):
                yield f"{what}: expected a Capture, got {describe(found)}"
                continue
            for name, value in (("maps", wanted), ("mass", mass), ("entropy", entropy)):
                yield from _differs(f"{what}: {name}", getattr(found, name), value)
            yield from _changed(what, given, (query, key, tokens))


def _planted(steps: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    random = numpy.random.default_rng(2)
    return random.random((2, 3, 12)).astype("float32") + 0.1, random.random((2, steps, 12)).astype("float32") + 0.1


def _contrast(backend: Any) -> Iterator[str]:
    layers, by_step = [0.5, 2.0], [1.0, 0.0, 3.0]
    cases: list[tuple[int, dict[str, Any]]] = [
        (3, {}),
        (1, {"lam": 0.25}),
        (3, {"lam": 0.0, "layer_weights": layers, "step_weights": by_step}),
        (3, {"normalize": "sum"}),
        (3, {"normalize": "max"}),
        (3, {"normalize": "minmax"}),
    ]
    for steps, options in cases:
        task, general = _planted(steps)
        fused = _fused(task, general, options)
        for form, make in _FORMS.items():
            given = [make(array.copy()) for array in (task, general)]
            more = {name: make(numpy.array(value)) if name.endswith("s") else value for name, value in options.items()}
            found = backend.contrast(*given, (3, 4), (7, 10), **more)
            what = f"contrast of {form} with {options}"
            yield from _differs(what, found, _upsample(fused.reshape(3, 4), (7, 10)))
            yield from _changed(what, given, (task, general))


def _fused(task: numpy.ndarray, general: numpy.ndarray, options: dict[str, Any]) -> numpy.ndarray:
    task, general = task.astype(float), general.astype(float)
    lam = options.get("lam", "mean")
    ratio = task / (general + (general.mean(-1, keepdims=True) if lam == "mean" else lam))
    by_layer, by_step = options.get("layer_weights", [1.0, 1.0]), options.get("step_weights", [1.0, 2.0, 3.0])
    fused: numpy.ndarray = numpy.einsum("ltn,l,t->n", ratio, by_layer, by_step)
    low = fused.min() if options.get("normalize") == "minmax" else 0.0
    divisors = {"sum": fused.sum(), "max": fused.max(), "minmax": fused.max() - low}
    return (fused - low) / divisors.get(options.get("normalize", "none"), 1.0)


def _upsample(grid: numpy.ndarray, size: tuple[int, int]) -> numpy.ndarray:
    """Bilinear, pixel centres at half numbers, edges repeated."""
    for axis, length in enumerate(size):
        at = ((numpy.arange(length) + 0.5) * grid.shape[axis] / length - 0.5).clip(0, grid.shape[axis] - 1)
        low = numpy.floor(at).astype(int)
        high = numpy.minimum(low + 1, grid.shape[axis] - 1)
        part = (at - low).reshape((-1, 1) if axis == 0 else (1, -1))
        grid = grid.take(low, axis) * (1 - part) + grid.take(high, axis) * part
    return grid


def _views(backend: Any) -> Iterator[str]:
    task, general = _planted(3)
    found = backend.contrast(task, general, [(2, 3), (3, 2)], [(4, 6), (9, 5)])
    if not isinstance(found, (list, tuple)) or len(found) != 2:
        yield f"contrast of two views: expected a list of two tensors, got {describe(found)}"
        return
    fused = _fused(task, general, {})
    for index, (part, grid, size) in enumerate(((fused[:6], (2, 3), (4, 6)), (fused[6:], (3, 2), (9, 5)))):
        yield from _differs(f"contrast of two views, view {index}", found[index], _upsample(part.reshape(grid), size))


# Three regions in 7 x 9 pixels: a small bright one, a large one, and one that touches the large one at a corner.
_SALIENCY = numpy.zeros((7, 9), "float32")
_SALIENCY[0:2, 0:2] = 9
_SALIENCY[3:6, 3:7] = 5
_SALIENCY[6, 7] = 6
_ABOVE = 17 / 63


def _regions(backend: Any) -> Iterator[str]:
    small, large, corner = [0, 0, 2, 2], [3, 3, 7, 6], [7, 6, 8, 7]
    cases: list[tuple[dict[str, Any], list[list[int]], list[float]]] = [
        ({"top": 1}, [large], [60]),
        ({"top": 5}, [large, small, corner], [60, 36, 6]),
        ({"top": 1, "score": "mean"}, [small], [9]),
        ({"top": 2, "score": "max"}, [small, corner], [9, 6]),
        ({"top": 2, "connectivity": 8}, [[3, 3, 8, 7], small], [66, 36]),
        ({"floor": 2}, [large, small], [60, 36]),
        ({"min_size": 4}, [large, small], [60, 36]),
        ({"min_size": 5, "score": "max"}, [large], [5]),
        ({"min_size": 2, "top": 2, "score": "mean"}, [small, large], [9, 5]),
        ({"min_size": 4, "floor": 1}, [large], [60]),
    ]
    for options, boxes, scores in cases:
        wanted = numpy.zeros(_SALIENCY.shape, bool)
        for x0, y0, x1, y1 in boxes:
            wanted[y0:y1, x0:x1] = _SALIENCY[y0:y1, x0:x1] > 0
        edges = numpy.array(boxes)
        box = (*edges[:, :2].min(0).tolist(), *edges[:, 2:].max(0).tolist())
        for form, make in _FORMS.items():
            given = make(_SALIENCY.copy())
            what = f"regions of {form} with {options}"
            found = backend.regions(given, keep=_ABOVE, **options)
            if not isinstance(found, Regions):
                yield f"{what}: expected Regions, got {describe(found)}"
                continue
            yield from _differs(f"{what}: mask", found.mask, wanted)
            yield from _differs(f"{what}: boxes", found.boxes, edges)
            yield from _differs(f"{what}: scores", found.scores, numpy.array(scores, float))
            if tuple(found.box) != box or found.reason is not None:
                yield f"{what}: expected box {box} and no reason, got {tuple(found.box)}, {found.reason!r}"
            yield from _changed(what, [given], [_SALIENCY])


def _degenerate(backend: Any) -> Iterator[str]:
    flat = backend.regions(numpy.ones((4, 6), "float32"), keep=0.4, top=2)
    small = backend.regions(_SALIENCY.copy(), keep=_ABOVE, min_size=13)
    for what, found, box in (
        ("a flat saliency", flat, (0, 0, 6, 4)),
        ("a saliency whose regions are all below min_size", small, (0, 0, 9, 7)),
    ):
        if not isinstance(found.reason, str) or tuple(found.box) != box or not bool(found.mask.all()):
            yield f"regions of {what}: expected all of it and a reason, got {describe(found)}"


def _carve(backend: Any) -> Iterator[str]:
    from PIL import Image

    general = numpy.full((1, 1, 12), 0.25, "float32")
    task = general.copy()
    task[0, 0, [6, 7, 10, 11]] = 4.0
    pixels = numpy.random.default_rng(3).integers(0, 256, (60, 80, 3), numpy.uint8)
    for form, image in (
        ("a PIL image", Image.fromarray(pixels)),
        ("a NumPy array", pixels),
        ("a list", pixels.tolist()),
    ):
        for named, size, preset in (
            ("paper", (80, 60), {"preset": "paper", "keep": 0.1, "top": 1}),
            ("exact", (50, 40), {"preset": "paper", "keep": 0.1, "top": 1, "size": (40, 50)}),
        ):
            found = backend.carve(image, task, general, grid=(3, 4), preset=preset)
            what = f"carve of {form}, {named} size"
            if not isinstance(found, CarveOutcome):
                yield f"{what}: expected a CarveOutcome, got {describe(found)}"
                continue
            fused = _fused(task, general, {"layer_weights": [1.0], "step_weights": [1.0]})
            yield from _differs(f"{what}: saliency", found.saliency, _upsample(fused.reshape(3, 4), (60, 80)))
            x0, y0, x1, y1 = found.regions.box
            # The four tokens are the lower right quarter, 40 x 40 pixels from (40, 20) on.
            if not (40 <= x0 < x1 <= 80 and 20 <= y0 < y1 <= 60) or found.reason is not None:
                yield f"{what}: expected a box inside of 40 20 80 60, got {found.regions.box}, {found.reason!r}"
            width, height = found.refined.size
            wide = named == "exact" or max(width, height) == 80
            if not wide or (named == "exact" and (width, height) != size):
                yield f"{what}: expected a refined image of {size}, got {(width, height)}"
    yield from _boxes(backend, Image.fromarray(pixels))
    found = backend.carve(Image.fromarray(pixels), general, general, grid=(3, 4))
    if not isinstance(found.reason, str) or found.refined.size != (80, 60):
        yield f"carve of equal maps: expected the image itself and a reason, got {describe(found.reason)}"


def _boxes(backend: Any, image: Any) -> Iterator[str]:
    """Grids on parts of an image of 80 x 60 pixels: in its middle, side by side, and one over the other."""
    task, general = _planted(1)
    task = task[:, :1]
    fused = _fused(task, general, {"layer_weights": [1.0, 1.0], "step_weights": [1.0]})
    left, right, middle, whole = (0, 0, 40, 60), (40, 0, 80, 60), (10, 6, 70, 54), (0, 0, 80, 60)
    cases: list[tuple[str, list[tuple[int, int]], list[tuple[int, ...]]]] = [
        ("a box", [(3, 4)], [middle]),
        ("two grids side by side", [(2, 3), (3, 2)], [left, right]),
        ("two grids, one over the other", [(2, 3), (3, 2)], [whole, right]),
        ("three grids beside a margin", [(2, 2), (1, 2), (3, 2)], [(0, 0, 40, 30), (0, 30, 40, 60), (40, 0, 70, 60)]),
    ]
    for what, grids, boxes in cases:
        summed, weight, done = numpy.zeros((60, 80)), numpy.zeros((60, 80)), 0
        for (rows, columns), (x0, y0, x1, y1) in zip(grids, boxes, strict=True):
            view = _upsample(fused[done : done + rows * columns].reshape(rows, columns), (y1 - y0, x1 - x0))
            density = rows * columns / ((x1 - x0) * (y1 - y0))
            summed[y0:y1, x0:x1] += density * view
            weight[y0:y1, x0:x1] += density
            done += rows * columns
        several = len(grids) > 1
        found = backend.carve(
            image, task, general, grid=grids if several else grids[0], box=boxes if several else boxes[0],
            preset={"preset": "paper", "keep": 0.1, "top": 99},
        )  # fmt: skip
        seen = weight > 0
        wanted = summed / numpy.where(seen, weight, 1.0)
        yield from _differs(f"carve of {what}: saliency", found.saliency, wanted)
        yield from _differs(f"carve of {what}: seen", found.seen, seen)
        mask = found.regions.mask.cpu().numpy()
        threshold = numpy.percentile(wanted[seen], 90)
        # A pixel at the threshold may be on either side of it.
        surely, perhaps = ((wanted > threshold * (1 + by)) & seen for by in (_ERROR, -_ERROR))
        if (mask & ~perhaps).any() or (surely & ~mask).any():
            yield (
                f"carve of {what}: expected the highest tenth of the {int(seen.sum())} pixels under the grids, got "
                f"{int(mask.sum())} pixels, {int((mask & ~seen).sum())} of them beside the grids"
            )


def _refusals(backend: Any) -> Iterator[str]:
    task, general = _planted(3)
    ragged = task.tolist()
    ragged[1][2].pop()
    query = numpy.zeros((1, 2, 1, 32), "float32")
    tokens = numpy.array([[0, 1]])
    pixels = numpy.zeros((6, 8, 3), numpy.uint8)
    calls: list[tuple[str, str, Callable[[], Any]]] = [
        ("task", "a ragged list", lambda: backend.contrast(ragged, general, (3, 4), (3, 4))),
        ("task", "[L, N]", lambda: backend.contrast(task[:, 0], general, (3, 4), (3, 4))),
        ("task", "a text", lambda: backend.contrast("maps", general, (3, 4), (3, 4))),
        ("task", "NaN", lambda: backend.contrast(task * numpy.float32("nan"), general, (3, 4), (3, 4))),
        ("general", "other tokens", lambda: backend.contrast(task, general[..., 1:], (3, 4), (3, 4))),
        ("grid", "too few tokens", lambda: backend.contrast(task, general, (3, 3), (3, 4))),
        ("size", "no pixels", lambda: backend.contrast(task, general, (3, 4), (0, 4))),
        ("lam", "-1", lambda: backend.contrast(task, general, (3, 4), (3, 4), lam=-1)),
        (
            "normalize",
            "'none at all'",
            lambda: backend.contrast(task, general, (3, 4), (3, 4), normalize="none at all"),
        ),
        ("saliency", "a ragged list", lambda: backend.regions([[1.0, 2.0], [3.0]], keep=0.4, top=2)),
        ("saliency", "[N]", lambda: backend.regions(_SALIENCY[0], keep=0.4, top=2)),
        ("keep", "0", lambda: backend.regions(_SALIENCY, keep=0, top=2)),
        ("top", "top and floor", lambda: backend.regions(_SALIENCY, keep=0.4, top=2, floor=2)),
        ("min_size", "0", lambda: backend.regions(_SALIENCY, keep=0.4, min_size=0)),
        ("score", "'median'", lambda: backend.regions(_SALIENCY, keep=0.4, top=2, score="median")),
        ("query", "a ragged list", lambda: backend.maps([[[[0.0] * 32], [[0.0] * 31]]], query, tokens, scale=1.0)),
        ("query", "[A, R, D]", lambda: backend.maps(query[0], query, tokens, scale=1.0)),
        ("key", "another head size", lambda: backend.maps(query, query[..., 1:], tokens, scale=1.0)),
        ("tokens", "fractions", lambda: backend.maps(query, query, tokens + 0.5, scale=1.0)),
        ("scale", "a text", lambda: backend.maps(query, query, tokens, scale="1")),
        ("image", "pixels [3, H, W]", lambda: backend.carve(pixels.transpose(2, 0, 1), task, general, grid=(3, 4))),
        ("box", "past an edge", lambda: backend.carve(pixels, task, general, grid=(3, 4), box=(4, 0, 12, 6))),
        ("box", "two for one grid", lambda: backend.carve(pixels, task, general, grid=(3, 4), box=[(0, 0, 4, 6)] * 2)),
        ("preset", "'no such preset'", lambda: backend.carve(pixels, task, general, grid=(3, 4), preset="none")),
    ]
    for name, got, call in calls:
        try:
            call()
        except (TypeError, ValueError) as error:
            if not str(error).startswith(name):
                yield f"{name} ({got}): expected an error that begins with {name}, got {type(error).__name__}: {error}"
        except Exception as error:
            yield f"{name} ({got}): expected a TypeError or ValueError, got {type(error).__name__}: {error}"
        else:
            yield f"{name} ({got}): expected an error, got a result"


def _answers(backend: Any, model: Any, image: Any) -> Iterator[str]:
    reason = backend.supports(model)
    if reason is not None:
        yield f"supports: expected None for the model, got {describe(reason)}"
        return
    result = backend.load(model)(image, "What is in the image?")
    for name, kind in (("answer", str), ("refined_answer", str), ("saliency", torch.Tensor), ("regions", Regions)):
        value = getattr(result, name, None)
        if not isinstance(value, kind):
            yield f"load: expected a result with {name}, a {kind.__name__}, got {describe(value)}"
    shape = tuple(getattr(getattr(result, "saliency", None), "shape", ()))
    if shape != (image.height, image.width):
        yield f"load: expected a saliency of {image.height} x {image.width} pixels, got {shape}"


def _differs(what: str, found: Any, wanted: numpy.ndarray) -> Iterator[str]:
    """A line if a tensor is not the wanted one: equal where that has whole numbers, else nearly so."""
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != wanted.shape:
        yield f"{what}: expected a tensor of shape {list(wanted.shape)}, got {describe(found)}"
        return
    values = found.detach().cpu().double().numpy()
    limit = _ERROR * numpy.abs(wanted) if wanted.dtype.kind == "f" else 0.0
    wrong = ~(numpy.abs(values - wanted) <= limit)
    if wrong.any():
        at = tuple(int(index) for index in numpy.argwhere(wrong)[0])
        yield f"{what}: expected {wanted[at]:.6g} at {list(at)}, got {values[at]:.6g}; {int(wrong.sum())} values differ"


def _changed(what: str, given: list[Any], before: Any) -> Iterator[str]:
    for index, (value, original) in enumerate(zip(given, before, strict=True)):
        if not numpy.array_equal(numpy.asarray(value), original):
            yield f"{what}: expected argument {index} as it was, got another value after the call"
