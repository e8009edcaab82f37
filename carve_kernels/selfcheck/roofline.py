"""The least time of a kernel on a GPU, from its counted work: predicted, not timed.

A prediction is the longest of three times: the bytes over the bandwidth, the operations over the rate of their units,
the launches times the cost of one. It assumes that loads, arithmetic and launches overlap perfectly. A real kernel
takes longer, and a ratio of predictions favours the one with more to overlap.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NamedTuple

from carve_kernels import checks
from carve_kernels.selfcheck.work import Work

# Seconds from one kernel of a stream to the next. A launch costs the host 2 to 4 us (the driver and the operator's
# checks), and a device that waits for its host runs no faster. In a graph the device itself starts the next kernel:
# what remains is one grid draining and the next one filling the device.
LAUNCH = 4.0e-6
GRAPH_LAUNCH = 1.5e-6

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

# The units that multiply in a kernel. A few rows are vector work: their matrix product would be mostly padding.
UNITS: dict[tuple[str, str], Unit] = {
    ("capture", "cuda"): "vector",
    ("capture", "triton"): "matrix",
    ("contrast", "triton"): "vector",
    ("regions", "cuda"): "vector",
}


class Prediction(NamedTuple):
    """The least seconds, which of the three times bounds them, and each of the three."""

    seconds: float
    bound: str
    memory: float
    arithmetic: float
    launch: float


def predict(work: Work, gpu: Gpu, *, unit: Unit = "matrix", graphs: bool = False) -> Prediction:
    """The least time of some work on a GPU, with launches by the host or from a CUDA graph."""
    times = {
        "memory": (work.read_bytes + work.written_bytes) / gpu.bandwidth,
        "arithmetic": work.operations / getattr(gpu, checks.choice("unit", unit, ("matrix", "vector"))),
        "launch": work.launches * (GRAPH_LAUNCH if graphs else LAUNCH),
    }
    bound = max(times, key=lambda name: times[name])
    return Prediction(times[bound], bound, **times)


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
    """What a backend's kernels move and compute in one call of a stage, or None where nothing counts it."""
    name = f"carve_kernels.selfcheck.{backend}_work"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    count = getattr(module, f"{stage}_work", None)
    work: Work | None = None if count is None else count(**sizes)
    return work
