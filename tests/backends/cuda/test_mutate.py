"""Planted faults: every pattern of the list is in the sources, and a few faults are planted and caught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.emulator.emulator import ROOT, compiler
from tests.emulator.faults import ATTENTION, CAPTURE, FAULTS, JOIN, LABEL, RANK, SELECT, Fault
from tests.emulator.mutate import Verdict, judge, plant

FEW = (SELECT[0], LABEL[13], JOIN[6], RANK[6], CAPTURE[0], ATTENTION[0])
AMOUNTS = {"regions": [], "capture": [], "attention": ["few"]}


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


@pytest.fixture(scope="module")
def right() -> Verdict:
    if compiler() is None:
        pytest.skip("the mutants need a C++ compiler")
    return judge("regions", "results", amount=AMOUNTS["regions"])


def test_without_a_fault_nothing_is_caught(right: Verdict) -> None:
    assert not right.fails, right.reason


@pytest.mark.slow
def test_without_a_fault_capture_is_right(right: Verdict) -> None:
    verdict = judge("capture", "results", amount=AMOUNTS["capture"])
    assert not verdict.fails, verdict.reason


@pytest.mark.parametrize(
    "fault", [FEW[0], *(pytest.param(fault, marks=pytest.mark.slow) for fault in FEW[1:])], ids=lambda fault: fault.name
)
def test_planted_faults_are_caught(right: Verdict, fault: Fault) -> None:
    limit = 120 + 10 * right.seconds
    assert judge(fault.stage, "results", fault, amount=AMOUNTS[fault.stage], limit=limit).fails
