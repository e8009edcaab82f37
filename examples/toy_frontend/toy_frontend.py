"""A frontend: where does each installed backend look? `python -m toy_frontend`."""

from __future__ import annotations

import math
import random

from carve_kernels.protocol import CarveBackend, discover

GRID, HEADS, SIZE = (4, 6), 2, 32


def point(backend: CarveBackend) -> tuple[int, ...]:
    """The box of a backend for one image, whose planted question looks at the token in row 2, column 4."""
    numbers = random.Random(0)
    keys = [[numbers.gauss(0, 1) for _ in range(SIZE)] for _ in range(GRID[0] * GRID[1])]
    planted, tokens = 2 * GRID[1] + 4, [list(range(len(keys)))]
    rows = {"question": keys[planted], "instruction": [0.0] * SIZE}
    maps = {
        name: backend.maps([[[row]] * HEADS], [[keys] * HEADS], tokens, scale=1 / math.sqrt(SIZE)).maps
        for name, row in rows.items()
    }
    pixels = [[[0, 128, 255]] * 60 for _ in range(40)]
    preset = {"preset": "paper", "keep": 0.1, "top": 1}
    outcome = backend.carve(pixels, maps["question"], maps["instruction"], grid=GRID, preset=preset)
    return outcome.regions.box


def main() -> None:
    for name, backend in discover().working().items():
        print(name, *point(backend))
    for name, reason in discover().broken().items():
        print(name, "cannot serve:", reason)


if __name__ == "__main__":
    main()
