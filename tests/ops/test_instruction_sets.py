"""Contrast and regions give the same bits with every instruction set of this machine."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from carve_kernels.backends import cpu

PROGRAM = """
import hashlib
import torch
from carve_kernels import contrast, regions
from tests.support.planted_maps import maps

bits = hashlib.sha256()
torch.manual_seed(0)
task, general = maps((13, 17), layers=3, steps=5)
for size in [(131, 97), (5, 203), (64, 3), (13, 17), (1, 1)]:
    for normalize in ["none", "sum", "minmax"]:
        bits.update(contrast(task, general, (13, 17), size, normalize=normalize, backend="cpu").numpy().tobytes())
saliency = contrast(task, general, (13, 17), (253, 331))
for values in [saliency, saliency.double(), torch.randn(97, 1003), torch.randn(97, 1003).mul(2).round()]:
    for score in ["sum", "mean", "max"]:
        found = regions(values, keep=0.3, floor=3, connectivity=8, score=score, backend="cpu")
        for part in [found.mask, found.boxes, found.scores]:
            bits.update(part.numpy().tobytes())
print(bits.hexdigest())
"""


@functools.cache
def bits_with(name: str) -> str:
    environment = {**os.environ, "CARVE_KERNELS_CPU": name}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    if "expected at most" in result.stderr or "lacks" in result.stderr:
        pytest.skip(f"this machine has no {name}")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_gives_the_same_bits(name: str) -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)
    assert bits_with(name) == bits_with("plain")


@pytest.mark.slow
def test_an_unknown_instruction_set_is_named() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)
    with pytest.raises(AssertionError, match=r"CARVE_KERNELS_CPU: expected one of 'plain', .* got 'sse9'"):
        bits_with("sse9")
