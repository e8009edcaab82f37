"""Peak memory of one forward, counted twice in a fresh process.

`tensors` is exact: the largest sum of what torch had allocated at one time, from the memory events of its profiler, and
so small enough a ruler for the scratch of one row. `resident` is what the system saw: VmHWM, reset before the forward
where the system lets it be. It holds the scratch of libraries as well, and is a few MB uncertain. getrusage's ru_maxrss
would not do: a process inherits in it the peak of the one that started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import kilobytes
from benchmarks.models import Shape, prompt, random_model

PLAIN, SESSION, EAGER = "plain", "session", "eager"
ROOT = Path(__file__).resolve().parents[1]
_STATUS = "/proc/self/status"
# Freed blocks go back to the system at once, or the order of allocations would show in the peak.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class Peak(NamedTuple):
    """Bytes above what stood before the forward, the weights above all."""

    tensors: int
    resident: int


def peak_in_fresh_process(what: str, shape: Shape, length: int, rows: int) -> Peak:
    """Peak of one prefill with a cache: plain sdpa, the same in a session, or eager with output_attentions."""
    task = {"what": what, "shape": shape._asdict(), "length": length, "rows": rows}
    return Peak(**in_fresh_process("benchmarks.memory", task))


def in_fresh_process(module: str, task: dict[str, Any]) -> Any:
    """What a module prints as its last line, as JSON, when it is run with this task."""
    command = [sys.executable, "-m", module, json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | _MALLOC, capture_output=True, text=True)
    if done.returncode:
        reason = "killed, most likely for memory" if done.returncode == -9 else done.stderr[-2000:]
        raise RuntimeError(f"memory of {task}: the process that measures it failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_tensors(run: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator held at one time during a call, beyond what stood before."""
    return max(event["Total Allocated"] for event in allocator_events(run))


def allocations(run: Callable[[], Any]) -> int:
    """How often a call asked torch's CPU allocator for memory."""
    return sum(event["Bytes"] > 0 for event in allocator_events(run))


def allocator_events(run: Callable[[], Any]) -> list[dict[str, int]]:
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [event["args"] for event in events if event.get("name") == "[memory]"]


def eager_bytes(shape: Shape, length: int) -> int:
    """What output_attentions alone keeps: one [S, S] matrix a head and layer."""
    return shape.layers * shape.heads * length**2 * getattr(torch, shape.dtype).itemsize


def peak_resident(run: Callable[[], Any]) -> int:
    before = kilobytes(_STATUS, "VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    run()
    return kilobytes(_STATUS, "VmHWM") - before


def forward(what: str, shape: Shape, rows: int) -> Callable[[int], None]:
    """A prefill of so many tokens as `generate` does it."""
    from carve_kernels import capture_attention

    model = random_model(shape, "eager" if what == EAGER else "sdpa")

    def run(length: int) -> None:
        session = capture_attention(model, layers="paper", rows=rows) if what == SESSION else nullcontext()
        with torch.no_grad(), session:
            model(**prompt(length, shape.dtype), logits_to_keep=1, output_attentions=what == EAGER)

    return run


def measured(task: dict[str, Any]) -> Peak:
    run = forward(task["what"], Shape(**task["shape"]), task["rows"])
    run(64)
    resident = peak_resident(lambda: run(task["length"]))
    return Peak(peak_of_tensors(lambda: run(task["length"])), resident)


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))._asdict()))
