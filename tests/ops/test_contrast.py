"""Contrast: every backend against the reference in float64, its laws, and its errors."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carve_kernels import BackendUnavailable, contrast
from carve_kernels.types import ContrastOptions
from tests.support.planted_maps import backends, maps, on_gpu, serving
from tests.support.tolerances import correlation, relative, roundings

CASES = [
    ((7, 5), (61, 83), 3, 2),
    ((5, 11), (5, 11), 1, 1),
    ((18, 32), (13, 17), 2, 3),
    ((9, 4), (3, 67), 4, 1),
    ((1, 1), (3, 2), 2, 2),
    ((6, 6), (1, 1), 2, 2),
]


@pytest.fixture(params=[*backends("contrast"), *on_gpu("contrast")])
def backend(request: pytest.FixtureRequest) -> str:
    task, general = maps((2, 2))
    options = ContrastOptions("mean", torch.ones(3), torch.ones(2), "none")
    return serving("contrast", request.param, task, general, [((2, 2), (4, 4))], options)


@pytest.mark.parametrize("normalize", ["none", "sum", "max", "minmax"])
@pytest.mark.parametrize("lam", ["mean", 1e-8, 0.0, 0.01])
@pytest.mark.parametrize(("grid", "size", "layers", "steps"), CASES)
def test_a_backend_is_as_accurate_as_the_reference(
    backend: str, grid: Any, size: Any, layers: int, steps: int, lam: Any, normalize: str
) -> None:
    task, general = maps(grid, layers=layers, steps=steps)
    options: dict[str, Any] = {"lam": lam, "normalize": normalize}
    truth = contrast(task.double(), general.double(), grid, size, **options, backend="reference")
    own = contrast(task, general, grid, size, **options, backend="reference")
    found = contrast(task, general, grid, size, backend=backend, **options)
    assert found.dtype == torch.float32 and found.shape == size
    if normalize == "minmax":
        # A subtraction makes the lowest value 0: errors are relative to what was subtracted.
        fused = contrast(task.double(), general.double(), grid, grid, lam=lam, backend="reference")
        if float(fused.max()) == float(fused.min()):
            assert not found.any()
            return
        offset = float(fused.min() / (fused.max() - fused.min()))
        truth, own, found = truth + offset, own + offset, found + offset
    assert relative(found, truth) <= relative(own, truth) + roundings(layers * steps + 8)
    if truth.numel() > 1 and grid != (1, 1):
        assert correlation(found, truth) > 1 - 1e-6


def test_a_general_map_of_one_step_serves_every_step(backend: str) -> None:
    task, general = maps((4, 6), steps=3)
    one = contrast(task, general[:, :1], (4, 6), (9, 9), backend=backend)
    three = contrast(task, general[:, :1].expand(-1, 3, -1), (4, 6), (9, 9), backend=backend)
    assert relative(one, three) < roundings(8)


def test_weights_default_to_the_papers(backend: str) -> None:
    task, general = maps((4, 6), layers=2, steps=3)
    plain = contrast(task, general, (4, 6), (9, 9), backend=backend)
    spelt = contrast(
        task, general, (4, 6), (9, 9), layer_weights=[1, 1], step_weights=torch.arange(1, 4), backend=backend
    )
    assert relative(plain, spelt) < roundings(8)
    single = contrast(task, general, (4, 6), (9, 9), layer_weights=[0, 2], step_weights=[0, 0, 3.0], backend=backend)
    alone = contrast(task[1:, 2:], general[1:, 2:], (4, 6), (9, 9), backend=backend)
    assert relative(single, 6 * alone) < roundings(8)


def test_views_share_the_mean_and_the_normalisation(backend: str) -> None:
    task, general = maps((1, 27))
    grids, sizes = [(3, 5), (4, 3)], [(17, 9), (2, 31)]
    for normalize in ("none", "sum", "max"):
        views = contrast(task, general, grids, sizes, normalize=normalize, backend=backend)
        fused = contrast(task.double(), general.double(), (1, 27), (1, 27), normalize=normalize, backend="reference")[0]
        ones = torch.ones(1, 1, 27, dtype=torch.float64)
        for view, part, grid, size in zip(views, fused.split([15, 12]), grids, sizes, strict=True):
            alone = contrast(part.reshape(1, 1, -1), ones[..., : len(part)], grid, size, lam=0.0, backend="reference")
            assert relative(view, alone) < roundings(40)


def test_zero_over_zero_is_zero(backend: str) -> None:
    task, general = maps((2, 3), layers=1, steps=1)
    task, general = task.clone(), general.clone()
    task[..., 0] = general[..., 0] = general[..., 1] = 0
    found = contrast(task, general, (2, 3), (2, 3), lam=0.0, backend=backend)
    assert found[0, 0] == 0 and found[0, 1] == 0 and bool((found.flatten()[2:] > 0).all())
    for normalize in ("none", "sum", "max", "minmax"):
        assert not contrast(task * 0, general * 0, (2, 3), (5, 5), normalize=normalize, backend=backend).any()


@pytest.mark.parametrize("size", [(97, 61), (5, 7), (200, 3)])
def test_upsampling_is_pillows_bilinear_both_ways(backend: str, size: Any) -> None:
    task, _ = maps((12, 19), layers=1, steps=1)
    found = contrast(task, torch.ones(1, 1, 1).expand_as(task), (12, 19), size, lam=0.0, backend=backend)
    image = Image.fromarray(task.reshape(12, 19).numpy())
    truth = numpy.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    assert relative(found, torch.from_numpy(truth.copy())) < 5e-6


def test_fusing_on_the_grid_equals_summing_saliencies(backend: str) -> None:
    task, general = maps((7, 9), layers=3, steps=2)
    fused = contrast(task, general, (7, 9), (50, 33), lam=1e-8, backend=backend)
    summed = torch.zeros(50, 33, dtype=torch.float64)
    for layer in range(3):
        for step in range(2):
            one = task[layer, step].double()[None, None], general[layer, step].double()[None, None]
            summed += (step + 1) * contrast(*one, (7, 9), (50, 33), lam=1e-8, backend="reference")
    whole = contrast(task.double(), general.double(), (7, 9), (50, 33), lam=1e-8, backend="reference")
    assert relative(whole, summed) < 1e-12
    # In float32 the weights of the resize alone are 1e-6 from the true ones.
    assert relative(fused, summed) < 2e-6


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 99), lam=st.sampled_from(["mean", 1e-8, 0.3]))
def test_laws(factor: float, seed: int, lam: Any) -> None:
    task, general = maps((4, 5), layers=4, steps=2, seed=seed)
    plain = contrast(task, general, (4, 5), (11, 6), lam=lam)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    assert relative(contrast(task[order], general[order], (4, 5), (11, 6), lam=lam), plain) < roundings(16)
    assert relative(contrast(task * factor, general, (4, 5), (11, 6), lam=lam), plain * factor) < roundings(16)
    if lam == "mean":
        both = contrast(task * factor, general * factor, (4, 5), (11, 6))
        assert relative(both, plain) < roundings(16)


@pytest.mark.parametrize("size", [(700, 611), (5, 90_000), (90_000, 3), (9, 7)])
def test_any_number_of_threads_gives_the_same_bits(size: Any, threads: Any) -> None:
    task, general = maps((24, 31), layers=20, steps=13)
    serving("contrast", "cpu", task, general)
    grids, sizes = [(20, 31), (4, 31)], [size, size[::-1]]
    wanted = contrast(task, general, grids, sizes, backend="cpu")
    for count in (2, 3, 5):
        threads(count)
        for view, same in zip(wanted, contrast(task, general, grids, sizes, backend="cpu"), strict=True):
            assert torch.equal(view, same)


def test_float64_stays_float64() -> None:
    task, general = maps((4, 5))
    assert contrast(task.double(), general.double(), (4, 5), (9, 8)).dtype == torch.float64


def replaced(**changes: Any) -> dict[str, Any]:
    task, general = maps((4, 5), layers=3, steps=2)
    return {"task": task, "general": general, "grid": (4, 5), "size": (9, 8), **changes}


def with_value(value: float) -> torch.Tensor:
    task = maps((4, 5), layers=3, steps=2)[0].clone()
    task[1, 1, 7] = value
    return task


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": [1.0]}, TypeError, "task: expected a tensor"),
        ({"task": torch.zeros(3, 20)}, ValueError, "task: expected shape"),
        ({"task": torch.zeros(0, 2, 20)}, ValueError, "at least one layer"),
        ({"task": torch.zeros(3, 2, 20, dtype=torch.float16)}, TypeError, "task: expected dtype"),
        ({"general": torch.zeros(3, 3, 20)}, ValueError, "general: expected 2 steps or 1"),
        ({"general": torch.zeros(2, 2, 20)}, ValueError, "general: expected shape"),
        ({"general": torch.zeros(3, 2, 20, dtype=torch.float64)}, TypeError, "general: expected dtype"),
        ({"general": torch.zeros(3, 2, 20, device="meta")}, ValueError, "general: expected a tensor on cpu"),
        ({"grid": (4, 4)}, ValueError, "grid: expected 20 tokens, got 4 x 4 = 16 tokens"),
        ({"grid": (3, 7)}, ValueError, "expected 20 tokens, got 3 x 7 = 21 tokens"),
        ({"grid": [(2, 5), (3, 3)], "size": [(4, 4)] * 2}, ValueError, "got 2 x 5 .* 3 x 3 = 19 tokens"),
        ({"grid": [(2, 5), (2, 5)]}, ValueError, "size: expected 2 sizes"),
        ({"grid": 20}, TypeError, "grid: expected a pair"),
        ({"grid": []}, TypeError, "grid: expected a pair"),
        ({"size": (0, 4)}, ValueError, "size.0.: expected an integer of at least 1"),
        ({"lam": -1e-9}, ValueError, "lam: expected a number of at least 0"),
        ({"lam": float("nan")}, ValueError, "lam: expected a finite number"),
        ({"lam": "median"}, TypeError, "lam: expected a number"),
        ({"layer_weights": [1.0, 2.0]}, ValueError, "layer_weights: expected 3 weights, got 2"),
        ({"step_weights": [1.0, -2.0]}, ValueError, "step_weights.1."),
        ({"step_weights": 3.0}, TypeError, "step_weights: expected a sequence"),
        ({"normalize": "mean"}, ValueError, "normalize: expected one of"),
        ({"task": with_value(float("nan"))}, ValueError, "task: expected finite values of at least 0, got NaN"),
        ({"task": with_value(float("inf"))}, ValueError, "task: expected finite values"),
        (
            {"general": with_value(-1.0)},
            ValueError,
            "general: expected finite values of at least 0, got values from -1",
        ),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"backend": "cuda"}, BackendUnavailable, "cuda"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        contrast(**replaced(**changes))


def test_value_checks_can_be_turned_off() -> None:
    assert contrast(**replaced(task=with_value(float("nan")), check=False)).isnan().any()
