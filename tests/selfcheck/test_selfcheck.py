"""The parts of `carve-kernels check`: moved tensors, tolerances that refuse wrong results, the clock, small trials."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from carve_kernels import backends, selfcheck
from carve_kernels.backends import SUPPORT
from carve_kernels.selfcheck import timing
from carve_kernels.selfcheck.judging import captures, close, identical
from carve_kernels.selfcheck.moving import move, same_bits, tensors
from carve_kernels.selfcheck.trials import Trial, trials
from carve_kernels.types import Attended, Capture, Regions

CPU = torch.device("cpu")


def test_a_moved_tensor_keeps_its_strides_and_the_memory_after_it() -> None:
    cache = torch.full((2, 3, 9, 8), float("nan"))
    cache[:, :, :7, :6] = torch.randn(2, 3, 7, 6)
    key = cache[:, :, :7, :6].transpose(1, 2)
    found = move(key, "cpu")
    assert torch.equal(found, key) and found.data_ptr() != key.data_ptr()
    assert found.stride() == key.stride() and found.storage_offset() == key.storage_offset()
    assert same_bits(found.as_strided(cache.shape, cache.stride(), 0), cache)
    assert move(key.detach().requires_grad_(), "cpu").requires_grad
    assert move(torch.zeros(1).expand(4, 5), "cpu").stride() == (0, 0)


def test_structures_are_moved_with_their_tensors() -> None:
    regions = Regions(torch.ones(2, 2, dtype=torch.bool), torch.zeros(1, 4), torch.ones(1), (0, 0, 2, 2))
    given = {
        "out": Capture(*(torch.randn(2) for _ in range(3))),
        "lists": [torch.ones(1), (2, "a")],
        "regions": regions,
    }
    found = move(given, "cpu")
    assert isinstance(found["out"], Capture) and found["lists"][1] == (2, "a") and found["regions"].box == regions.box
    assert same_bits([*given.values()], [*found.values()])
    assert len(list(tensors(list(found.values())))) == 3 + 1 + 3


def test_equal_bits_differ_from_equal_values() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone()) and not same_bits(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1)) and same_bits(torch.tensor(3), torch.tensor(3))


def first(stage: str, part: str = "") -> Trial:
    return next(trial for build in trials(quick=True) if (trial := build()).stage == stage and part in trial.name)


def answer(trial: Trial) -> Any:
    return move(trial.call(*trial.arguments, **trial.options, backend="reference"), "cpu")


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "nan": lambda maps: maps * float("nan"),
    "one element": lambda maps: maps.index_add(
        -1, torch.tensor([maps.shape[-1] // 3]), 1e-3 * maps[..., :1].abs() + 1e-9
    ),
    "another token": lambda maps: maps.roll(1, -1),
    "a thousandth": lambda maps: maps * 1.001,
    "flat": lambda maps: maps.mean(-1, keepdim=True).expand_as(maps),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_passes_any_trial(fault: str) -> None:
    """The reference passes every quick trial; its result with a fault passes none."""
    passed = 0
    for build in trials(quick=True):
        trial = build()
        if trial.stage == "regions":
            continue
        right = answer(trial)
        assert trial.judge(right).problem is None, trial.name
        if isinstance(right, Attended):
            faulty: Any = right._replace(capture=right.capture._replace(maps=FAULTS[fault](right.capture.maps)))
        elif isinstance(right, Capture):
            faulty = right._replace(maps=FAULTS[fault](right.maps))
        else:
            faulty = [FAULTS[fault](view) for view in right] if isinstance(right, list) else FAULTS[fault](right)
        verdict = trial.judge(faulty)
        assert verdict.problem is not None, trial.name
        passed += 1
    assert passed > 20


@pytest.mark.parametrize("fault", ["zeros", "nan", "another token", "flat"])
def test_outputs_of_attention_are_judged(fault: str) -> None:
    for build in trials(quick=True):
        trial = build()
        if trial.stage == "attention":
            right = answer(trial)
            verdict = trial.judge(right._replace(output=FAULTS[fault](right.output)))
            assert verdict.problem is not None and verdict.problem.startswith("output: "), trial.name
    assert "expected torch.bfloat16 of shape" in str(
        first("attention").judge(answer(first("attention"))._replace(output=torch.zeros(1))).problem
    )


def test_mass_and_entropy_are_judged_too() -> None:
    trial = first("capture", "one row, float32")
    right = answer(trial)
    for name in ("mass", "entropy"):
        verdict = trial.judge(right._replace(**{name: getattr(right, name) * 1.001}))
        assert verdict.problem is not None and verdict.problem.startswith(f"{name}: relative error 1.0e-03")


def test_a_slot_of_another_layer_is_out_of_bounds() -> None:
    trial = first("capture", "three layers")
    found = answer(trial)
    assert trial.judge(found).problem is None
    found.mass[0, 2] = 0.5
    assert trial.judge(found).problem == "out: a slot of another step or layer was written"


@pytest.mark.parametrize("part", ["mask", "boxes", "scores", "box", "reason"])
def test_regions_are_identical_or_wrong(part: str) -> None:
    truth = answer(first("regions"))
    value = getattr(truth, part)
    other = {"box": (0, 0, 1, 1), "reason": "none"}.get(part, value ^ True if part == "mask" else value)
    if part in ("boxes", "scores"):
        other = value + 1
    parts = {name: getattr(truth, name) for name in ("mask", "boxes", "scores", "box", "reason")}
    verdict = identical(Regions(**{**parts, part: other}), truth)
    assert verdict.problem is not None and verdict.problem.startswith(f"{part}: ")
    assert identical(truth, truth).problem is None


def test_shapes_and_zeros_are_judged() -> None:
    truth = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert close("x", truth.float(), truth, truth, 1e-6).problem is None
    padding = close("x", torch.tensor([1e-9, 1.0, 2.0]), truth, truth, 1e-6)
    assert padding.problem is not None and "1 elements beyond" in padding.problem
    assert "expected shape [3], got [2]" in str(close("x", truth[:2], truth, truth, 1e-6).problem)
    # A backend in bfloat16 may have half the rounding of the reference in bfloat16.
    reference = truth.bfloat16() * 1.01
    assert close("x", truth * 1.005, reference, truth, 1e-6).problem is None
    assert captures(*[Capture(truth[1:], truth[1:], truth[1:])] * 3, 1e-6).problem is None  # type: ignore[arg-type]


def test_every_full_case_is_named_once() -> None:
    for quick in (True, False):
        builds = trials(quick=quick)
        keys = [(build.func.__name__, build.args[0], build.args[1:2]) for build in builds]  # type: ignore[attr-defined]
        assert len({str(key) for key in keys}) == len(builds) == selfcheck.count(quick=quick)
    assert selfcheck.count(quick=False) > 100


def test_a_clock_on_a_cpu_flushes_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda: 2**16)
    clock = timing.Clock(CPU, rounds=4)
    assert clock._buffer.nbytes == 2**17
    order = []
    # Read and not written: see the clock.
    clock._buffer = SimpleNamespace(sum=lambda: order.append("flush"))  # type: ignore[assignment]

    def run() -> None:
        order.append("call")
        time.sleep(1e-3)

    found = clock.time(run)
    assert order == ["call"] * 3 + ["flush", "call"] * 4
    assert found.seconds.rounds == 4 and 1e-3 <= found.seconds.p10 <= found.seconds.median <= found.seconds.p90
    assert found.graph is None and found.why_no_graph == "CUDA graphs are for CUDA devices"


@contextlib.contextmanager
def serving_a_cpu(backend: str, stage: str) -> Iterator[None]:
    """A GPU backend whose kernels run on the CPU: Triton in its interpreter, CUDA in the emulator."""
    if backend == "cuda":
        emulator = pytest.importorskip("tests.emulator.emulator")
        with emulator.serving(stage):
            yield
    elif reason := backends.why_not(stage, backend, CPU):
        pytest.skip(reason)
    else:
        yield


@pytest.mark.parametrize(
    ("backend", "stage"),
    [
        ("triton", "capture"),
        ("triton", "contrast"),
        ("triton", "column_sums"),
        ("cuda", "capture"),
        ("cuda", "attention"),
        ("cuda", "contrast"),
        ("cuda", "regions"),
    ],
)
def test_the_kernels_for_a_gpu_pass_the_small_cases(backend: str, stage: str) -> None:
    if SUPPORT[stage][backend] is not None:
        pytest.skip(SUPPORT[stage][backend])
    with serving_a_cpu(backend, stage):
        small = [trial for build in trials(quick=True) if (trial := build()).stage == stage and trial.sizes is None]
        found = [selfcheck._check(trial, backend, CPU) for trial in small]
    assert [entry for entry in found if entry["right"] is not True] == []
    assert len(found) > 5
