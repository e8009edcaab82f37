"""The machine of a measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from carve_kernels.backends import cpu
from carve_kernels.selfcheck.timing import last_level_cache


def describe() -> dict[str, Any]:
    """Processor, cores, threads, instruction sets, memory, load and versions."""
    flags = set(_field("/proc/cpuinfo", "flags").split())
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": "amx_bf16" in flags,
        "instructions": cpu.isa()[0] if cpu.unavailable() is None else None,
        "last_level_cache": last_level_cache(),
        "memory": kilobytes("/proc/meminfo", "MemTotal"),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "numpy", "scipy", "pillow", "carve-kernels")},
    }


def kilobytes(path: str, name: str) -> int:
    """A field in kB of a file of /proc, in bytes; 0 where there is none."""
    return 1024 * int((_field(path, name) or "0").split()[0])


def _field(path: str, name: str) -> str:
    if not Path(path).exists():
        return ""
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
