"""Faults in the C++ kernels of column sums are caught; `python -m tests.native.mutants` plants all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.emulator.emulator import ROOT, compiler
from tests.native.mutants import FAULTS, Fault, fails, plant


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_place(fault: Fault, tmp_path: Path) -> None:
    target = tmp_path / fault.file
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / fault.file, target)
    plant(fault, tmp_path)
    assert target.read_text() != (ROOT / fault.file).read_text()
    with pytest.raises(ValueError, match=f"{fault.name}: expected"):
        plant(fault._replace(old="\x00"), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_planted_fault_is_caught() -> None:
    assert not fails()
    assert fails(FAULTS[0])
