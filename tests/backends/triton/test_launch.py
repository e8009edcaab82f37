"""The direct launch: correct hints, arguments as Triton's launcher passes them, scratch by stream."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from carve_kernels.backends.triton import capture_kernels, contrast_kernels
from carve_kernels.backends.triton.capture_plan import PLAIN
from carve_kernels.backends.triton.launch import VECTOR_BYTES, Kernel, alignment, strides_of

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
KERNELS = [
    value for module in (capture_kernels, contrast_kernels) for value in vars(module).values() if type(value) is Kernel
]


@given(
    addresses=st.lists(st.integers(0, 2**48).map(lambda half: 2 * half), min_size=1, max_size=12),
    strides=st.lists(st.integers(0, 2**40), max_size=12),
    element_size=st.sampled_from([2, 4]),
)
def test_every_hint_is_correct_and_none_is_missing(addresses: list[int], strides: list[int], element_size: int) -> None:
    found = alignment(addresses, strides, element_size)
    everything = [*addresses, *(stride * element_size for stride in strides)]
    assert found in (1, 2, 4, 8, 16) and all(value % found == 0 for value in everything)
    assert found == VECTOR_BYTES or any(value % (2 * found) for value in everything)


@pytest.mark.parametrize("element_size", [2, 4])
def test_aligned_tensors_have_the_hint_and_one_odd_stride_takes_it(element_size: int) -> None:
    unit = 16 // element_size
    assert alignment([256, 4096], [0, 128, 3 * unit], element_size) == 16
    assert alignment([256, 4096 + element_size], [128], element_size) == element_size
    assert alignment([256, 4096], [128, 3 * unit + 1], element_size) == element_size
    assert alignment([256, 4096 + 8], [128], element_size) == 8


@pytest.mark.parametrize("shape", [(2, 3, 5, 32), (1, 3, 1, 32), (2, 1, 5, 1)])
def test_dimensions_of_one_element_do_not_weaken_the_hint(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(7 * 7 * 7 * 64).as_strided(shape, (3, 5, 7, 11))
    for size, stride, ours in zip(shape, tensor.stride(), strides_of(tensor), strict=True):
        assert ours == (stride if size > 1 else 0)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.jit.fn.__name__)
def test_parameters_are_pointers_then_typed_numbers_then_constants(kernel: Kernel) -> None:
    kinds = []
    for name, parameter in inspect.signature(kernel.jit.fn).parameters.items():
        if "constexpr" in str(parameter.annotation):
            kinds.append("constant")
            assert name.isupper()
        elif name.endswith(("_ptr", "_ptrs")):
            kinds.append("pointer")
            assert parameter.annotation is inspect.Parameter.empty
        else:
            kinds.append("number")
            index = kinds.count("number") - 1
            assert (parameter.annotation is inspect.Parameter.empty) == (index in kernel._tuples)
    assert kinds == sorted(kinds, key=["pointer", "number", "constant"].index)


@pytest.fixture(scope="module")
def calls() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Triton 3.8 builds a syntax tree in a way that Python 3.13 warns about.
    warnings = ["-W", "error", "-W", "ignore:AnnAssign.__init__ missing:DeprecationWarning"]
    result = subprocess.run(
        [sys.executable, *warnings, "-m", "tests.backends.triton.direct"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout))


def test_the_second_call_passes_what_tritons_launcher_passed(calls: dict[str, Any]) -> None:
    first, again = calls["first"], calls["again"]
    assert first["compiled"] == 2 and first["tensors"]
    assert again["compiled"] == 0 and not again["tensors"]
    assert again["launches"] == first["launches"]
    names = [name for name, _, _ in again["launches"]]
    assert names == ["capture_scores_kernel", "capture_map_kernel"]


def test_numbers_compile_nothing_and_types_do(calls: dict[str, Any]) -> None:
    assert {name: call["compiled"] for name, call in calls.items()} == {
        "first": 2,
        "again": 0,
        "other numbers": 0,
        "other keys": 0,
        "a shifted key": 1,
        "a mask": 1,
        "long tokens": 1,
        "a known lse": 1,
        "a known lse again": 0,
    }
    assert calls["other numbers"]["launches"] != calls["first"]["launches"]
    assert [name for name, _, _ in calls["a known lse again"]["launches"]] == ["capture_reread_kernel"]


def test_a_shifted_key_loses_the_hint(calls: dict[str, Any]) -> None:
    def constants(call: str) -> list[Any]:
        return list(calls[call]["launches"][0][2][-8:])

    # Alignment, elements of it, dense, kind, window, tiles, batch, and whether launches overlap.
    assert constants("first") == [16, 8, True, PLAIN, False, False, False, True]
    assert constants("a shifted key") == [2, 1, True, PLAIN, False, False, False, True]
