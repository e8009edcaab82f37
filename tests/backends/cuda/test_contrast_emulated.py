"""The kernels of contrast on a CPU: in many thread orders, on any sizes, with strides, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carve_kernels import BackendUnavailable
from carve_kernels import contrast as public
from carve_kernels.backends.cuda.plan import contrast_scratch
from carve_kernels.backends.native import weights
from carve_kernels.selfcheck.cuda_work import contrast_work
from tests.emulator import emulator
from tests.support.planted_maps import maps
from tests.support.tolerances import relative, roundings

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the emulator of CUDA needs a C++ compiler")

reference = partial(public, backend="reference", check=False)
launch = partial(public, backend="cuda", check=False)

KINDS = ("none", "sum", "max", "minmax")


@pytest.fixture(scope="module", autouse=True)
def _served() -> Iterator[None]:
    """Any test of this file may be the first one in its process."""
    with emulator.serving("contrast"):
        yield


@pytest.mark.parametrize("normalize", ["none", "minmax"])
def test_any_order_of_threads_gives_the_same_bits(normalize: str) -> None:
    task, general = maps((23, 31), layers=4, steps=3)
    views = [(3, 31), (20, 31)], [(70, 40), (5, 66)]
    wanted = launch(task, general, *views, lam="mean", normalize=normalize)
    for order, resident in (("reverse", 1), ("shuffled", 4), ("shuffled", 9)):
        with emulator.running("contrast", order, resident=resident, seed=resident):
            found = launch(task, general, *views, lam="mean", normalize=normalize)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_one_of_several_views_has_the_bits_of_the_view_alone() -> None:
    task, general = maps((1, 12 + 35), layers=2, steps=2)
    both = launch(task, general, [(3, 4), (5, 7)], [(9, 8), (33, 72)], lam=0.01)
    alone = launch(task[..., 12:], general[..., 12:], (5, 7), (33, 72), lam=0.01)
    assert torch.equal(both[1], alone)


@pytest.mark.parametrize(("views", "launches"), [(1, 2), (32, 2), (33, 3)])
@pytest.mark.parametrize("layers", [1, 6])
def test_two_launches_for_any_number_of_layers_and_32_views(views: int, launches: int, layers: int) -> None:
    task, general = maps((1, 6 * views), layers=layers, steps=2)
    emulator.counters("contrast")
    launch(task, general, [(2, 3)] * views, [(5, 4)] * views, lam="mean", normalize="max")
    assert emulator.counters("contrast").launches == launches


def test_strides_of_layers_and_steps_need_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    task, general = (part.contiguous() for part in maps((6, 7), layers=3, steps=4))
    wide = torch.full((4, 3, 2, 42), torch.nan)
    wide[:, :, 1] = task.transpose(0, 1)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda _self: pytest.fail("a copy"))
    found = launch(wide[:, :, 1].transpose(0, 1), general, (6, 7), (20, 24))
    assert torch.equal(found, launch(task, general, (6, 7), (20, 24)))
    monkeypatch.undo()
    other = task.transpose(0, 2).contiguous().transpose(0, 2)
    assert other.stride(2) != 1 and torch.equal(launch(other, general, (6, 7), (20, 24)), found)


@pytest.mark.parametrize("normalize", KINDS)
def test_a_nan_affects_what_it_does_in_the_reference(normalize: str) -> None:
    task, general = maps((4, 5), layers=2, steps=2)
    task = task.clone()
    task[1, 0, 7] = float("nan")
    for size in ((13, 17), (4, 5), (3, 20)):
        truth = reference(task, general, (4, 5), size, lam="mean", normalize=normalize)
        found = launch(task, general, (4, 5), size, lam="mean", normalize=normalize)
        assert torch.equal(found.isnan(), truth.isnan())
        assert torch.equal(found.nan_to_num(0.0) == 0, truth.nan_to_num(0.0) == 0)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), height=st.integers(1, 80), width=st.integers(1, 80),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_grid_on_any_size_is_torchs_antialias(rows: int, columns: int, height: int, width: int, seed: int) -> None:
    task, general = maps((rows, columns), layers=1, steps=1, seed=seed)
    truth = reference(task.double(), general.double(), (rows, columns), (height, width), lam=0.01)
    found = launch(task, general, (rows, columns), (height, width), lam=0.01)
    assert relative(found, truth) < roundings(12)


@pytest.mark.parametrize(
    ("layers", "steps", "general_steps", "grid", "size", "options"),
    [
        (2, 3, 3, (16, 16), (64, 192), {}),
        (6, 8, 1, (24, 31), (37, 200), {"normalize": "minmax"}),
        (1, 1, 1, (30, 40), (9, 7), {"lam": 0.1}),
        (3, 100, 100, (7, 9), (30, 1100), {"normalize": "sum", "lam": 0.1}),
        (1, 2, 1, (48, 50), (40, 60), {}),
    ],
)
def test_the_work_is_what_the_kernels_move(
    layers: int, steps: int, general_steps: int, grid: Any, size: Any, options: dict[str, Any]
) -> None:
    task, general = maps(grid, layers=layers, steps=steps)
    emulator.counters("contrast")
    launch(task, general[:, :general_steps], grid, size, **options)
    moved = emulator.counters("contrast")
    work = contrast_work(layers=layers, steps=steps, grid=grid, size=size, general_steps=general_steps, **options)
    assert (moved.read_bytes, moved.written_bytes, moved.launches) == work[:2] + work[3:]


def test_weights_are_copied_to_the_device_once() -> None:
    task, general = maps((2, 3), layers=2, steps=2)
    options: dict[str, Any] = {"layer_weights": [0.5, 2.0], "step_weights": torch.tensor([3.0, 4.0]), "lam": 0.1}
    launch(task, general, (2, 3), (4, 4), **options)
    before = weights._copied.cache_info()
    launch(task, general, (2, 3), (4, 4), **options)
    after = weights._copied.cache_info()
    assert (after.hits, after.misses) == (before.hits + 2, before.misses)


def test_weights_that_a_graph_was_captured_with_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(weights, "_IN_GRAPHS", {})
    monkeypatch.setattr(weights, "_copied", lambda values, _device: torch.tensor(values))
    for capturing, kept in ((False, []), (True, [((1.0, 2.0), device)])):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        found = weights.on_device((1.0, 2.0), device)
        assert list(weights._IN_GRAPHS) == kept
    assert weights._IN_GRAPHS[(1.0, 2.0), device] is found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": torch.ones(1, 1, 6, dtype=torch.float64)}, "float64, this backend serves torch.float32"),
        ({"general": torch.ones(1, 1, 6, requires_grad=True)}, "general requires a gradient"),
        ({"size": (2**27, 4)}, r"pass 2\^28 on an axis"),
        ({"grid": (1, 20_000), "size": (1, 4)}, "more than 10240 for four pixels"),
        ({"task": torch.ones(1, 1, 1).expand(1, 2**17 + 1, 6)}, "this backend serves 131072"),
    ],
)
def test_unsupported_arguments_have_a_reason(changes: dict[str, Any], reason: str) -> None:
    arguments = {"task": torch.ones(1, 1, 6), "general": torch.ones(1, 1, 6), "grid": (2, 3), "size": (4, 4), **changes}
    if "task" in changes:
        arguments["general"] = arguments["task"][:, :1]
    if "grid" in changes:
        arguments["task"] = arguments["general"] = torch.ones(1, 1, 20_000)
    with pytest.raises(BackendUnavailable, match=reason):
        public(**arguments, backend="cuda", check=False)


def operands(**changes: Any) -> list[Any]:
    task, general = (part.contiguous() for part in maps((3, 4), layers=2, steps=3))
    given = {"task": task, "general": general, "layer_weights": torch.ones(2, dtype=torch.float64)}
    given |= {"step_weights": torch.ones(3, dtype=torch.float64), "shapes": [3, 4, 5, 8], "lam": 0.1, "is_mean": False}
    given |= {"normalize": 0, "scratch": torch.zeros(contrast_scratch(6, 12), dtype=torch.uint8)}
    return [*(given | {"out": torch.empty(40)} | changes).values()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": torch.ones(2, 3, 24)[..., ::2]}, "task: expected stride 1 along the tokens, got 2"),
        ({"task": torch.ones(2, 12)}, "task: expected float32 with 3 dimensions, got a torch.float32 tensor of shape"),
        ({"general": torch.ones(2, 2, 12)}, "general: expected 1 or 3 steps"),
        ({"layer_weights": torch.ones(2)}, "layer_weights: expected float64"),
        ({"shapes": [3, 4, 5, 7]}, "shapes: 0 tokens and 5 pixels belong to no view"),
        ({"normalize": 4}, "normalize: expected a number from 0 to 3, got 4"),
        ({"scratch": torch.zeros(1, dtype=torch.uint8)}, "scratch: expected at least 288 bytes, got 1"),
        ({"scratch": torch.zeros(1, dtype=torch.int8)}, "scratch: expected contiguous uint8"),
        ({"scratch": torch.zeros(2000, dtype=torch.uint8)[4:]}, "scratch: expected 16 bytes of alignment"),
        ({"out": torch.empty(40, dtype=torch.float64)}, "out: expected float32"),
    ],
)
def test_the_operator_refuses_what_it_cannot_do(changes: dict[str, Any], message: str) -> None:
    emulator.operators.contrast_cuda(*operands())
    with pytest.raises(RuntimeError, match=f"contrast_cuda: {message}"):
        emulator.operators.contrast_cuda(*operands(**changes))


@pytest.mark.parametrize("fail", [1, 2, 3])
def test_a_failed_call_of_cuda_is_an_error_with_its_name(fail: int) -> None:
    with emulator.running("contrast", fail=fail), pytest.raises(RuntimeError, match=r"\w+: planted failure"):
        launch(*maps((2, 3)), (2, 3), (4, 4))
