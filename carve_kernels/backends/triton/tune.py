"""Find the fastest tiles of capture on this machine's GPU, and write them to a file for CARVE_KERNELS_TILES.

    python -m carve_kernels.backends.triton.tune --output tiles.json

Nothing is tuned automatically: the table in `tiles` is used until the variable names a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from carve_kernels.backends.triton import capture, device, tiles, unavailable
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot

_RUNS = 20
# More than the second-level cache of any GPU: a decode step does not find its keys there.
_CACHE_BYTES = 256 * 2**20

Measure = Callable[[Callable[[], Any]], float]


def candidates(name: str, start: tiles.Tiles) -> Iterator[tiles.Tiles]:
    """The tiles to try for one of the kernels: blocks, warps and stages near the present ones."""
    present: tiles.TileConfig = getattr(start, name)
    blocks = sorted({max(present.block // 2, 16), present.block, min(present.block * 2, 256)})
    for block, warps, stages in itertools.product(blocks, (4, 8), (2, 3, 4)):
        tried = tiles.TileConfig(block, warps, stages)
        if tried != present:
            yield start._replace(**{name: tried})


def best(row: str, start: tiles.Tiles, calls: Mapping[str, Callable[[], Any]], measure: Measure) -> tiles.Tiles:
    """The tiles of one row with which the call of each kernel is fastest; tiles that do not run are skipped."""
    fastest = start
    for name, call in calls.items():
        least = _timed(row, fastest, call, measure)
        for tried in candidates(name, fastest):
            time = _timed(row, tried, call, measure)
            if time < least:
                fastest, least = tried, time
    return fastest


def problem(
    where: torch.device, lanes: int, size: int, kernel: str, keys: int = 4096, tokens: int = 1024
) -> Callable[[], Any]:
    """Six layers in half precision, with rows that fill a tile of `lanes` lanes; one field of `Tiles` names the kernel.

    Keys are read again where the log-sum-exp is given.
    """
    rows = 1 if lanes == tiles.LANES[0] else 8
    query = [torch.randn(1, 28, rows, size, dtype=torch.float16, device=where) for _ in range(6)]
    key = [torch.randn(1, 4, keys, size, dtype=torch.float16, device=where) for _ in range(6)]
    columns = torch.arange(tokens, dtype=torch.int32, device=where)[None]
    out = Capture(*(torch.empty(1, 6, 1, rows, *last, device=where) for last in ((tokens,), (), ())))
    step = torch.zeros((), dtype=torch.int64, device=where)
    lse = torch.zeros(1, 28, rows, device=where) if kernel == "reread" else None
    options = CaptureOptions(size**-0.5, lse=lse)
    return lambda: capture.forward_layers(Layers(query, key), columns, options, Slot(out, step))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m carve_kernels.backends.triton.tune", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    path: Path = parser.parse_args(arguments).output
    if not path.resolve().parent.is_dir():
        parser.error(f"--output: expected a file in a directory that exists, got {path}")
    reason = unavailable() or (None if torch.cuda.is_available() else "torch finds no CUDA device here")
    if reason is not None:
        print(f"nothing to tune: {reason}", file=sys.stderr)
        return 2
    where = torch.device("cuda", torch.cuda.current_device())
    architecture = device.architecture_of(where)
    rows = {}
    for lanes, size in itertools.product(tiles.LANES, (32, 64, 128, 256)):
        row = tiles.row_name(architecture, 2, lanes, size)
        calls = {kernel: problem(where, lanes, size, kernel) for kernel in tiles.Tiles._fields}
        rows[row] = best(row, tiles.row_of(architecture, 2, lanes, size), calls, on_gpu)
        print(f"{row}: {rows[row]}", file=sys.stderr)
    _write(path, rows)
    return 0


def on_gpu(call: Callable[[], Any]) -> float:
    """Milliseconds of a call on the GPU with a cold cache, the median of several."""
    call()
    flush = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(_RUNS):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _timed(row: str, tried: tiles.Tiles, call: Callable[[], Any], measure: Measure) -> float:
    """The time with some tiles, passed as a user's file would be; infinite where they do not fit."""
    before = os.environ.get(tiles.ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiles.json")
        _write(path, {row: tried})
        os.environ[tiles.ENVIRONMENT] = str(path)
        device.tiles_of.cache_clear()
        try:
            return measure(call)
        except Exception as error:
            # Triton's error for too much shared memory has no narrower base class.
            print(f"{row}: {tried} does not run: {error}", file=sys.stderr)
            return float("inf")
        finally:
            os.environ.pop(tiles.ENVIRONMENT)
            if before is not None:
                os.environ[tiles.ENVIRONMENT] = before
            device.tiles_of.cache_clear()


def _write(path: Path, rows: dict[str, tiles.Tiles]) -> None:
    path.write_text(
        json.dumps({row: chosen._asdict() for row, chosen in rows.items()}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
