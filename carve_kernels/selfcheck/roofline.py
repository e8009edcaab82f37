"""The least time of a kernel on a GPU, from its counted work: predicted, not timed.

A prediction is the cost of the launches, and the longer of two times: the bytes over the bandwidth that a copy reaches,
and the operations over the rate of their units. It assumes that loads and arithmetic overlap perfectly. A real kernel
takes longer, and a ratio of predictions favours the one with more to overlap.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NamedTuple

from carve_kernels import checks
from carve_kernels.selfcheck.work import Work

# Seconds of 1, 2 and 3 dependent kernels that do nothing, measured by events on one H100 (torch 2.11, CUDA 13): 3.6 and
# 5.9 us launched from C++, 4.0, 5.3 and 7.3 us in a graph. What Python does before a launch is not included: one
# operator of torch took the host 11 us there.
LAUNCH, START = 2.35e-6, 1.2e-6
GRAPH_LAUNCH, GRAPH_START = 1.65e-6, 2.2e-6
# The share of the data sheet's bandwidth that a copy reached there: 3.0 of 3.35 TB/s.
REACHED = 0.9

Unit = Literal["matrix", "vector"]


class Gpu(NamedTuple):
    """The rates of a GPU: bytes a second, and operations a second of its matrix units (bf16, dense) and of its FMAs."""

    name: str
    bandwidth: float
    matrix: float
    vector: float


# From NVIDIA's data sheets: A100 SXM 80 GB, H100 SXM, B200. By compute capability, which related GPUs share.
_FAMILIES = {
    (8, 0): Gpu("A100", 2.04e12, 312e12, 19.5e12),
    (9, 0): Gpu("H100", 3.35e12, 989e12, 67e12),
    (10, 0): Gpu("B200", 8.0e12, 2250e12, 75e12),
}
GPUS = {gpu.name: gpu for gpu in _FAMILIES.values()}

# The units that multiply in a kernel, of 16-bit keys.
UNITS: dict[tuple[str, str], Unit] = {
    ("capture", "cuda"): "matrix",
    ("capture", "triton"): "matrix",
    ("attention", "cuda"): "matrix",
    ("contrast", "cuda"): "vector",
    ("contrast", "triton"): "vector",
    ("regions", "cuda"): "vector",
}


class Prediction(NamedTuple):
    """The least seconds, the longest of the three times, and each of the three."""

    seconds: float
    bound: str
    memory: float
    arithmetic: float
    launch: float


def predict(work: Work, gpu: Gpu, *, unit: Unit = "matrix", graphs: bool = False) -> Prediction:
    """The least time of some work on a GPU, with launches by the host or from a CUDA graph."""
    each, start = (GRAPH_LAUNCH, GRAPH_START) if graphs else (LAUNCH, START)
    times = {
        "memory": (work.read_bytes + work.written_bytes) / (REACHED * gpu.bandwidth),
        "arithmetic": work.operations / getattr(gpu, checks.choice("unit", unit, ("matrix", "vector"))),
        "launch": start + work.launches * each if work.launches else 0.0,
    }
    bound = max(times, key=lambda name: times[name])
    return Prediction(times["launch"] + max(times["memory"], times["arithmetic"]), bound, **times)


def gpu_of(properties: Any) -> Gpu | None:
    """The rates of a device from `torch.cuda.get_device_properties`, or None where they do not suffice.

    The bandwidth follows from the memory's clock and width, or else is that of a data sheet; a GPU of an unknown family
    has no limit on its arithmetic.
    """
    family = _FAMILIES.get((properties.major, properties.minor))
    # Two transfers a clock; kHz and bits.
    measured = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8
    if family is not None and (measured or family.name in properties.name):
        return family._replace(name=properties.name, bandwidth=measured or family.bandwidth)
    return Gpu(properties.name, measured, float("inf"), float("inf")) if measured else None


def work_of(stage: str, backend: str, **sizes: Any) -> Work | None:
    """What a backend's kernels move and compute in one call of a stage, or None where nothing counts it here."""
    name = f"carve_kernels.selfcheck.{backend}_work"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    count = getattr(module, f"{stage}_work", None)
    try:
        work: Work | None = None if count is None else count(**sizes)
    # Some counts need the compiled library.
    except checks.BackendUnavailable:
        return None
    return work
