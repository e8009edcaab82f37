"""Peak memory of one forward, measured twice in a fresh process.

`tensors` is exact: the largest total of torch's allocations at one time, from the memory events of its profiler; it
resolves even the scratch of one row. `resident` is the system's VmHWM, reset before the forward where that is allowed;
it includes the scratch of libraries and varies by a few MB. getrusage's ru_maxrss is no use: a process inherits the
peak of its parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.support.machine import kilobytes
from benchmarks.support.models import Shape, prompt, random_model

PLAIN, SESSION, EAGER = "plain", "session", "eager"
ROOT = Path(__file__).resolve().parents[2]
_STATUS = "/proc/self/status"
# Freed blocks return to the system at once; otherwise the peak would depend on the order of allocations.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class Peak(NamedTuple):
    """Bytes above those before the forward (mostly the weights)."""

    tensors: int
    resident: int


def peak_in_fresh_process(what: str, shape: Shape, length: int, rows: int) -> Peak:
    """Peak of one prefill with a cache: plain sdpa, the same in a session, or eager with output_attentions."""
    task = {"what": what, "shape": shape._asdict(), "length": length, "rows": rows}
    return Peak(**in_fresh_process("benchmarks.support.memory", task))


def in_fresh_process(module: str, task: dict[str, Any], environment: Mapping[str, str] = _MALLOC) -> Any:
    """The last line, as JSON, that a module prints when it is run with this task."""
    command = [sys.executable, "-m", module, json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        reason = "killed, most likely for memory" if done.returncode == -9 else done.stderr[-2000:]
        raise RuntimeError(f"{module} of {task}: its process failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_tensors(run: Callable[[], Any]) -> int:
    """The most bytes of torch's CPU allocator at one time during a call, above those before it."""
    events = allocator_events(run)
    # The total has what was allocated under an earlier profile and still lives.
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - before


def allocations(run: Callable[[], Any]) -> int:
    """The number of allocations of torch's CPU allocator during a call."""
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
    """The size of the matrices of output_attentions: [S, S] for each head and layer."""
    return shape.layers * shape.heads * length**2 * getattr(torch, shape.dtype).itemsize


def peak_resident(run: Callable[[], Any]) -> int:
    before = kilobytes(_STATUS, "VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    run()
    return kilobytes(_STATUS, "VmHWM") - before


def forward(what: str, shape: Shape, rows: int) -> Callable[[int], None]:
    """A prefill of so many tokens, as in `generate`."""
    from carve_kernels import capture_attention

    model = random_model(shape, "eager" if what == EAGER else "sdpa")

    def run(length: int) -> None:
        session = capture_attention(model, layers="paper", rows=rows) if what == SESSION else nullcontext()
        with torch.no_grad(), session:
            model(**prompt(length, shape.dtype), logits_to_keep=1, output_attentions=what == EAGER)

    return run


def measure_here(task: dict[str, Any]) -> Peak:
    run = forward(task["what"], Shape(**task["shape"]), task["rows"])
    run(64)
    resident = peak_resident(lambda: run(task["length"]))
    return Peak(peak_of_tensors(lambda: run(task["length"])), resident)


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))._asdict()))
