"""What regions take on an H100 in a CUDA graph: predicted from counts, kernel by kernel; not timed.

Every term is added, as if nothing overlapped. `python -m benchmarks.gpu.predicted_regions` prints the tables of
benchmarks/results/2026-11-28-regions-predicted.md, which says where the counts and the rates come from.
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
_SORTED, _KEPT = 2048, 0.2


def kernels(image: Image) -> list[Kernel]:
    """The launches of a call in their order.

    Instructions of a warp are those of the compiled kernels for sm_90 that it runs: once for straight code, eight times
    for the rows of a tile, where an empty tile, one of long runs and one of noise take 450, 2450 and 3010.
    """
    pixels, noisy = image.side**2, image.name == NOISE
    mb = pixels * 4 / 1e6
    selecting, blocks, tiles = pixels // _SELECT_BLOCK, pixels // _BLOCK, pixels // _TILE
    merges = -(-pixels // 2 // _SORTED) > 256
    runs = -(-image.regions // _SORTED)
    # From the least distance on, a step of the network waits for half of its elements, loaded from shared memory.
    steps = sum(range(1, min(image.regions, _SORTED).bit_length() + 1))
    launches = [
        Kernel("clear"),
        Kernel(
            "select, first digit",
            dram_mb=mb,
            instructions=544 * 16 * selecting,
            added=image.counters[0],
            added_to_one=2 * selecting,
        ),
        Kernel(
            "select, second",
            cache_mb=mb + selecting * 0.0328,
            instructions=1000 * 16 * selecting,
            added=image.counters[1],
        ),
        Kernel(
            "select, third",
            cache_mb=mb + selecting * 0.0041,
            instructions=792 * 16 * selecting,
            added=image.counters[2],
            added_to_one=selecting,
        ),
        Kernel(
            "label",
            cache_mb=2 * mb + tiles * 0.002 + image.parts * 28e-6,
            instructions=8 * (image.tiles * (3010 if noisy else 2450) + (tiles - image.tiles) * 450),
            added_to_one=image.tiles,
        ),
        Kernel(
            "join",
            cache_mb=3 * pixels // 64 * 4 * _SECTOR / 1e6,
            instructions=250 * 3 * pixels // 64 / _WARP,
            added=image.joined,
            other=1.0,
        ),
        Kernel(
            "add",
            cache_mb=image.parts * 3 * _SECTOR / 8e6,
            instructions=60 * 8192 + 100 * image.parts / _WARP,
            added=6 * (image.parts - image.regions),
            added_to_one=image.regions // _WARP,
        ),
        Kernel("sort", cache_mb=image.regions * (3 * _SECTOR + 24) / 1e6, other=0.09 * steps * max(1, runs / 264)),
    ]
    launches += _merges(image, runs, two=merges)
    launches.append(
        Kernel("keep", cache_mb=1.25 * mb + (_KEPT * pixels * 2 * _SECTOR / (1 if noisy else _WARP) / 1e6),
               instructions=8 * blocks * (600 if noisy else 380), other=1.0)
    )  # fmt: skip
    return launches


def _merges(image: Image, runs: int, *, two: bool) -> list[Kernel]:
    """A block searches the other runs of its group for its first element, then 256 threads search where theirs are."""
    if runs == 1:
        return [Kernel("merge", launches=2 if two else 1, is_idle=True)]
    if not two:
        # Two rounds of blocks, of which a fifth have kept elements, eleven steps of 0.3; nine of 0.12 for eight runs.
        return [Kernel("merge", instructions=_KEPT * image.regions / _WARP * runs * 9 * 9,
                       other=2 * 11 * 0.3 + runs / 8 * 9 * 0.12)]  # fmt: skip
    rounds = -(-image.regions // 256 // 342)
    return [
        Kernel("merge, 32 runs", instructions=image.regions / _WARP * 31 * 9 * 9,
               other=rounds * (11 * 0.3 + 4 * 9 * 0.12)),
        Kernel("merge, the rest", instructions=_KEPT * image.regions / _WARP * 8 * 10 * 9,
               other=rounds * 16 * 0.3 + 10 * 0.12),
    ]  # fmt: skip


def seconds(name: str, side: int) -> float | None:
    """Predicted seconds on an H100 in a graph, or None where nothing was counted."""
    for image in IMAGES:
        if (image.name, image.side) == (name, side):
            return 1e-6 * sum(kernel.microseconds(first=at == 0) for at, kernel in enumerate(kernels(image)))
    return None


if __name__ == "__main__":
    for image in IMAGES:
        print(f"\n### {image.name}, {image.side} x {image.side}\n")
        print("| kernel | DRAM, MB | L2, MB | instructions of warps, M | scattered additions | us |\n|" + " --- |" * 6)
        total = 0.0
        for at, kernel in enumerate(kernels(image)):
            spent = kernel.microseconds(first=at == 0)
            total += spent
            print(f"| {kernel.name} | {kernel.dram_mb:.1f} | {kernel.cache_mb:.1f} | {kernel.instructions / 1e6:.1f} | "
                  f"{kernel.added} | {spent:.1f} |")  # fmt: skip
        print(f"| all | | | | | {total:.0f} |")
