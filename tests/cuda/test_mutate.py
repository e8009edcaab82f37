"""Planted faults: every pattern of the list is in the sources, and a few of the faults are planted and caught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cuda.emulator import ROOT, compiler
from tests.cuda.faults import FAULTS, LABEL, RANK, SELECT
from tests.cuda.mutate import judge, plant

FEW = {fault.name: fault for fault in (SELECT[0], LABEL[6], RANK[1])}


def copy_of(file: str, root: Path) -> Path:
    target = root / "csrc/cuda" / file
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / "csrc/cuda" / file, target)
    return target


def test_the_names_differ() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_every_fault_can_be_planted(tmp_path: Path) -> None:
    for fault in FAULTS:
        root = tmp_path / fault.name
        before = copy_of(fault.file, root).read_text()
        plant(fault, root)
        after = (root / "csrc/cuda" / fault.file).read_text()
        assert after != before and len(after) == len(before) + len(fault.new) - len(fault.old), fault.name


def test_a_pattern_that_is_gone_is_an_error(tmp_path: Path) -> None:
    copy_of(SELECT[0].file, tmp_path)
    plant(SELECT[0], tmp_path)
    with pytest.raises(ValueError, match=f"{SELECT[0].name}: expected 1 of .*, got 0"):
        plant(SELECT[0], tmp_path)


@pytest.mark.skipif(compiler() is None, reason="the mutants need a C++ compiler")
def test_planted_faults_are_caught_and_nothing_else() -> None:
    right = judge("regions", "results", amount=[])
    assert not right.fails, right.reason
    for name, fault in FEW.items():
        verdict = judge(fault.stage, "results", fault, amount=[], limit=120 + 10 * right.seconds)
        assert verdict.fails, name
