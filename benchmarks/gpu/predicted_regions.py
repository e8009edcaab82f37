"""What regions take on an H100 in a CUDA graph: predicted from counts, kernel by kernel; not timed.

Every term is added, as if the work of a kernel never overlapped. `python -m benchmarks.gpu.predicted_regions` prints
the tables of benchmarks/results/2026-11-28-regions-predicted.md, which says where counts and rates come from.
"""

from __future__ import annotations

from typing import NamedTuple

# Microseconds: the first launch of a graph, events included; one more that depends on it; of a kernel with work, what
# waits for the kernel before and for one access after another; of a kernel that finds nothing to do.
FIRST, NEXT, SERIAL, IDLE = 4.0, 1.65, 1.5, 0.7
# A microsecond: bytes of device memory and of the second-level cache, instructions of warps, additions to scattered
# addresses, and to one address.
DRAM, CACHE, ISSUED, ADDED, ADDED_TO_ONE = 3.0e6, 5.5e6, 0.9e6, 12.5e3, 1.7e3


class Kernel(NamedTuple):
    """Counts of a launch. Bytes are those that leave a multiprocessor; `other`: microseconds that no count has."""

    name: str
    launches: int = 1
    dram_mb: float = 0.0
    cache_mb: float = 0.0
    instructions: float = 0.0
    added: int = 0
    added_to_one: int = 0
    other: float = 0.0
    is_idle: bool = False

    def microseconds(self, *, first: bool = False) -> float:
        work = 1e6 * (self.dram_mb / DRAM + self.cache_mb / CACHE) + self.instructions / ISSUED
        work += self.added / ADDED + self.added_to_one / ADDED_TO_ONE + self.other
        return (FIRST if first else self.launches * NEXT + (IDLE if self.is_idle else SERIAL)) + work


class Image(NamedTuple):
    """What the emulator counted for an image of `side` x `side` float32 pixels, of which 0.2 are kept."""

    name: str
    side: int
    tiles: int  # of 32 x 64 pixels, with parts of regions
    counters: tuple[int, int, int]  # additions of a block's counters to those of all, in each pass
    joined: int  # atomics of union-find across the edges of tiles
    parts: int
    regions: int


SMOOTH, NOISE = "smooth", "white noise"
IMAGES = (
    Image(SMOOTH, 1024, 316, (5_780, 24_449, 26), 362, 368, 98),
    Image(NOISE, 1024, 512, (19_170, 28_850, 29), 1_789, 129_505, 127_717),
    Image(NOISE, 2048, 2048, (76_274, 116_151, 125), 7_379, 517_370, 509_996),
)
# Microseconds in a graph to stay below; the last is what an H100 took from the call to the boxes before.
GOALS = {(SMOOTH, 1024): 60.0, (NOISE, 1024): 120.0, (NOISE, 2048): 1224.0}

_WARP = 32
_SECTOR = 32
_SELECT_BLOCK, _BLOCK, _TILE = 512 * 16, 256 * 8, 32 * 64
_SORTED, _RUNS, _KEPT = 2048, 256, 0.2


def kernels(image: Image) -> list[Kernel]:
    """The launches of a call in their order.

    Instructions of a warp are those of the compiled kernels for sm_90 that it runs: once for straight code, eight times
    for the rows of a tile, where an empty tile, one of long runs and one of noise take 450, 2450 and 3010. The second
    and the third digit and the labels load the saliency while the kernel before them ends.
    """
    pixels, noisy = image.side**2, image.name == NOISE
    mb = pixels * 4 / 1e6
    selecting, blocks, tiles = pixels // _SELECT_BLOCK, pixels // _BLOCK, pixels // _TILE
    two_merges = -(-pixels // 2 // _SORTED) > _RUNS
    runs = -(-image.regions // _SORTED)
    # A bitonic network has one step for each distance of each width.
    steps = sum(range(1, (min(image.regions, _SORTED) - 1).bit_length() + 1))
    edges = 3 * pixels // 64
    launches = [
        Kernel("clear"),
        Kernel(
            "select, first digit", dram_mb=mb, instructions=370 * 16 * selecting, added=image.counters[0],
            added_to_one=2 * selecting,
        ),
        Kernel(
            "select, second digit", cache_mb=selecting * 0.0328, instructions=800 * 16 * selecting,
            added=image.counters[1],
        ),
        Kernel(
            "select, third digit", cache_mb=selecting * 0.0041, instructions=620 * 16 * selecting,
            added=image.counters[2], added_to_one=selecting,
        ),
        Kernel(
            "label", cache_mb=mb + tiles * 0.002 + image.parts * 28e-6, added_to_one=image.tiles,
            instructions=8 * (image.tiles * (3010 if noisy else 2450) + (tiles - image.tiles) * 450),
        ),
        Kernel(
            "join", cache_mb=edges * 4 * _SECTOR / 1e6, instructions=250 * edges / _WARP, added=image.joined, other=1.0
        ),
        Kernel(
            "add", cache_mb=image.parts * 12e-6, instructions=60 * 8192 + 100 * image.parts / _WARP,
            added=6 * (image.parts - image.regions), added_to_one=image.regions // _WARP,
        ),
        Kernel(
            "sort", cache_mb=image.regions * (3 * _SECTOR + 24) / 1e6,
            other=steps * (0.06 if runs == 1 else 0.09) * max(1.0, runs / 264),
        ),
    ]  # fmt: skip
    launches += _merges(image, runs, two=two_merges)
    looked_up = _KEPT * pixels * 2 * _SECTOR / (1 if noisy else _WARP)
    instructions = 8 * blocks * (600 if noisy else 380)
    launches.append(Kernel("keep", cache_mb=1.25 * mb + looked_up / 1e6, instructions=instructions, other=1.0))
    return launches


def _merges(image: Image, runs: int, *, two: bool) -> list[Kernel]:
    """The merges of sorted runs, of which a smooth image has one.

    A block searches the other runs of its group for the places of its first and last element, eleven steps or more of
    0.3 us; where it has kept elements, its threads search between them, eight runs at a time, nine steps of 0.12 us.
    """
    if runs == 1:
        return [Kernel("merge", launches=2 if two else 1, is_idle=True)]
    warps = image.regions / _WARP
    rounds = -(-image.regions // 256 // 342)
    if not two:
        other = rounds * 11 * 0.3 + runs / 8 * 9 * 0.12
        return [Kernel("merge", instructions=_KEPT * warps * runs * 9 * 9, other=other)]
    first = Kernel("merge, 32 runs", instructions=warps * 31 * 9 * 9, other=rounds * (11 * 0.3 + 4 * 9 * 0.12))
    groups = -(-runs // 32)
    other = rounds * 16 * 0.3 + 10 * 0.12
    return [first, Kernel("merge, the rest", instructions=_KEPT * warps * groups * 10 * 9, other=other)]


def seconds(name: str, side: int) -> float | None:
    """Predicted seconds on an H100 in a graph, or None where nothing was counted."""
    for image in IMAGES:
        if (image.name, image.side) == (name, side):
            return 1e-6 * sum(kernel.microseconds(first=at == 0) for at, kernel in enumerate(kernels(image)))
    return None


def main() -> None:
    heads = ("kernel", "DRAM, MB", "L2, MB", "instructions of warps, M", "scattered additions", "us")
    for image in IMAGES:
        print(f"\n### {image.name}, {image.side} x {image.side}\n")
        print(f"| {' | '.join(heads)} |")
        print(f"|{' --- |' * len(heads)}")
        total = 0.0
        for at, kernel in enumerate(kernels(image)):
            spent = kernel.microseconds(first=at == 0)
            total += spent
            counts = f"{kernel.dram_mb:.1f} | {kernel.cache_mb:.1f} | {kernel.instructions / 1e6:.1f} | {kernel.added}"
            print(f"| {kernel.name} | {counts} | {spent:.1f} |")
        print(f"| all | | | | | {total:.0f} |")


if __name__ == "__main__":
    main()
