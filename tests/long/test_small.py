"""Short versions of the long tests: the same code with fewer images."""

from __future__ import annotations

from pathlib import Path

from tests.long.kill import prove
from tests.long.soak import soak


def test_killed_runs_lose_and_repeat_nothing(tmp_path: Path) -> None:
    (found,) = prove(tmp_path, images=8, kills=1)
    assert 0 < found < 8


def test_memory_is_flat() -> None:
    first, last = soak((32, 64))
    # The images, masks and saliencies of 32 questions are 40 MiB; allocators take a while to settle.
    assert last - first < 24
