"""Contrast by the Triton backend: memory accesses, order of programs, launches, and memory traffic."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

from carve_kernels import BackendUnavailable
from carve_kernels import contrast as public
from carve_kernels.backends.triton import contrast
from carve_kernels.backends.triton.contrast_kernels import _sum_before
from carve_kernels.backends.triton.contrast_plan import plan_grid
from carve_kernels.selfcheck.triton_work import contrast_work
from tests.backends.triton import interpreter
from tests.backends.triton.guard import Guards, guard_allocations
from tests.support.planted_maps import maps
from tests.support.tolerances import relative, roundings

if not triton.knobs.runtime.interpret:
    pytest.skip("guards and counters want the interpreter", allow_module_level=True)

reference = partial(public, backend="reference", check=False)
launch = partial(public, backend="triton", check=False)

KINDS = ("none", "sum", "max", "minmax")


@pytest.mark.parametrize("lam", ["mean", 0.01])
@pytest.mark.parametrize(
    ("grid", "size", "normalize"),
    [
        ((7, 5), (19, 83), "none"),
        ((23, 31), (23, 5), "minmax"),
        ([(9, 31), (1, 2), (11, 13)], [(16, 64), (3, 1), (17, 65)], "sum"),
    ],
)
def test_nothing_outside_the_tensors_is_accessed(
    grid: Any, size: Any, normalize: str, lam: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = sum(rows * columns for rows, columns in (grid if isinstance(grid, list) else [grid]))
    task, general = maps((1, tokens), layers=3, steps=4)
    options: dict[str, Any] = {"lam": lam, "normalize": normalize}
    truth = reference(task.double(), general.double(), grid, size, **options)
    guards = Guards()
    guarded = guards.put("task", task), guards.put("general", general)
    with monkeypatch.context() as patched:
        guard_allocations(guards, patched)
        found = launch(*guarded, grid, size, **options)
    guards.check()
    for view, true in zip(found, truth, strict=True) if isinstance(found, list) else [(found, truth)]:
        offset = 1.0 if normalize == "minmax" else 0.0
        assert relative(view + offset, true + offset) < roundings(24)


def test_any_order_of_programs_gives_the_same_bits() -> None:
    task, general = maps((23, 31), layers=4, steps=3)
    assert min(plan_grid(12, 23 * 31)[::2]) > 1
    views = [(3, 31), (20, 31)], [(70, 40), (5, 66)]
    wanted = launch(task, general, *views, lam="mean", normalize="minmax")
    for order in ("reverse", "shuffled"):
        with interpreter.programs_in(order):
            found = launch(task, general, *views, lam="mean", normalize="minmax")
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_one_of_several_views_has_the_bits_of_the_view_alone() -> None:
    task, general = maps((1, 12 + 35), layers=2, steps=2)
    both = launch(task, general, [(3, 4), (5, 7)], [(9, 8), (33, 70)], lam=0.01)
    alone = launch(task[..., 12:], general[..., 12:], (5, 7), (33, 70), lam=0.01)
    assert torch.equal(both[1], alone)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("layers", [1, 6])
def test_two_launches_for_any_number_of_layers_and_views(views: int, layers: int) -> None:
    task, general = maps((1, 6 * views), layers=layers, steps=2)
    with interpreter.traffic() as traffic:
        launch(task, general, [(2, 3)] * views, [(5, 4)] * views, lam="mean", normalize="max")
    assert traffic.launches == ["contrast_grid_kernel", "contrast_pixels_kernel"]


@pytest.mark.parametrize(
    ("layers", "steps", "general_steps", "grid", "size"),
    [
        (2, 3, 3, (16, 16), (64, 192)),
        (6, 4, 1, (24, 31), (37, 200)),
        (1, 1, 1, (30, 40), (9, 7)),
    ],
)
def test_the_work_is_what_the_kernels_move(layers: int, steps: int, general_steps: int, grid: Any, size: Any) -> None:
    task, general = maps(grid, layers=layers, steps=steps)
    with interpreter.traffic() as traffic:
        launch(task, general[:, :general_steps], grid, size, lam="mean")
    work = contrast_work(layers=layers, steps=steps, grid=grid, size=size, general_steps=general_steps)
    assert traffic.read_bytes == pytest.approx(work.read_bytes, rel=0.05)
    assert traffic.written_bytes == pytest.approx(work.written_bytes, rel=0.05)
    assert len(traffic.launches) == work.launches


@triton.jit
def _sum_kernel(lefts, rights, out_ptr, COUNT: tl.constexpr):
    tl.store(out_ptr, _sum_before(lefts, rights, 2, COUNT))


def test_offsets_of_tensors_beyond_two_thousand_million_elements() -> None:
    total = torch.zeros(1, dtype=torch.int64)
    with interpreter.overflows_are_errors():
        # Numbers are passed as 2 n + 1.
        _sum_kernel[(1,)]((120_001, 140_001, 3, 3), (120_001, 140_001, 3, 3), total, COUNT=4)
    assert int(total) == 60_000**2 + 70_000**2
    # Unused memory costs nothing.
    storage = torch.empty(2**32)
    task, general = (
        part.as_strided((3, 2, 6), (2**30, 2**29, 2**27), start) for start, part in enumerate([storage] * 2)
    )
    for part, values in zip((task, general), maps((2, 3), layers=3, steps=2), strict=True):
        part.copy_(values)
    truth = reference(task.double(), general.double(), (2, 3), (5, 4), lam="mean")
    with interpreter.overflows_are_errors():
        found = launch(task, general, (2, 3), (5, 4), lam="mean")
    assert relative(found, truth) < roundings(16)


@pytest.mark.parametrize("normalize", KINDS)
def test_a_nan_affects_what_it_does_in_the_reference(normalize: str) -> None:
    task, general = maps((4, 5), layers=2, steps=2)
    task = task.clone()
    task[1, 0, 7] = float("nan")
    truth = reference(task, general, (4, 5), (13, 17), lam="mean", normalize=normalize)
    found = launch(task, general, (4, 5), (13, 17), lam="mean", normalize=normalize)
    assert torch.equal(found.isnan(), truth.isnan())
    assert torch.equal(found.nan_to_num(0.0) == 0, truth.nan_to_num(0.0) == 0)


@settings(max_examples=20)
@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), height=st.integers(1, 80), width=st.integers(1, 80),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_grid_on_any_size_is_torchs_antialias(rows: int, columns: int, height: int, width: int, seed: int) -> None:
    task, general = maps((rows, columns), layers=1, steps=1, seed=seed)
    truth = reference(task.double(), general.double(), (rows, columns), (height, width), lam=0.01)
    found = launch(task, general, (rows, columns), (height, width), lam=0.01)
    assert relative(found, truth) < roundings(12)


def test_weights_are_copied_to_the_device_once() -> None:
    task, general = maps((2, 3), layers=2, steps=2)
    options: dict[str, Any] = {"layer_weights": [0.5, 2.0], "step_weights": torch.tensor([3.0, 4.0]), "lam": 0.1}
    launch(task, general, (2, 3), (4, 4), **options)
    before = contrast._weights.cache_info()
    launch(task, general, (2, 3), (4, 4), **options)
    after = contrast._weights.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": torch.ones(1, 1, 6, dtype=torch.float64)}, "float64, this backend serves torch.float32"),
        ({"general": torch.ones(1, 1, 6, requires_grad=True)}, "general requires a gradient"),
        ({"size": (2**27, 4)}, r"pass 2\^28 on an axis"),
    ],
)
def test_unsupported_arguments_have_a_reason(changes: dict[str, Any], reason: str) -> None:
    arguments = {"task": torch.ones(1, 1, 6), "general": torch.ones(1, 1, 6), "grid": (2, 3), "size": (4, 4), **changes}
    if "task" in changes:
        arguments["general"] = arguments["general"].double()
    with pytest.raises(BackendUnavailable, match=reason):
        public(**arguments, backend="triton")
