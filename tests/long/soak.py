"""A soak test: the memory of the process while the embedded model answers thousands of questions.

python -m tests.long.soak --images 2000
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import tests.support.tiny_models  # noqa: F401
from carve_kernels import CarveEngine, load
from carve_kernels.models import small
from carve_kernels.models.scenes import draw_scene

MEBIBYTE = 2**20
MARKS = (100, 1000, 2000)
# Allowed growth after the first mark, in MiB: the general maps of 2,000 images are 8 MiB.
ALLOWED = 32


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


def soak(marks: Sequence[int]) -> Iterator[float]:
    """Memory after each of these numbers of images."""
    engine = CarveEngine(*load(small(), dtype="float32"))
    scenes, same = itertools.tee(draw_scene(seed, 1 + seed % 4, split="test") for seed in range(marks[-1]))
    outcomes = engine.stream((scene.image for scene in scenes), (scene.question for scene in same))
    for number, result in enumerate(outcomes, 1):
        if result.error is not None:
            raise result.error
        if number in marks:
            gc.collect()
            yield resident()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=MARKS[-1])
    count = parser.parse_args().images
    # On a busy machine, threads of a model this small wait for each other.
    torch.set_num_threads(1)
    marks = [mark for mark in MARKS if mark < count] + [count]
    found = []
    for mark, size in zip(marks, soak(marks), strict=True):
        print(f"{mark} images: {size:.0f} MiB", flush=True)
        found.append(size)
    if found[-1] - found[0] > ALLOWED:
        raise SystemExit(f"memory grew by {found[-1] - found[0]:.0f} MiB, {ALLOWED} are allowed")


if __name__ == "__main__":
    main()
