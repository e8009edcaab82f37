"""Kernels with one planted fault each are caught; `python -m tests.backends.triton.mutants` plants more."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton

from tests.backends.triton.mutants import SHORT, Mutant, is_caught

if not triton.knobs.runtime.interpret:
    pytest.skip("some of the proofs run in the interpreter", allow_module_level=True)


@pytest.mark.parametrize("mutant", SHORT, ids=lambda mutant: mutant.name)
def test_a_planted_fault_is_caught(mutant: Mutant) -> None:
    assert is_caught(mutant)
