"""A driver without a GPU: kernels go through Triton's launch path and are compiled, but never run."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.backends.triton.limits import SHARED_BYTES


def target_of(name: str) -> GPUTarget:
    """The target of a name such as "90" or "gfx942"."""
    return GPUTarget("cuda", int(name), 32) if name.isdecimal() else GPUTarget("hip", name, 64)


class Launcher:
    """Replaces the compiled launcher, and records the arguments of every launch."""

    launches: ClassVar[list[tuple[str, tuple[int, int, int], tuple[Any, ...]]]] = []

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name: str = metadata.name

    def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
        # Stream, function, packed metadata, launch metadata and two hooks come before the kernel's arguments.
        self.launches.append((self.name, (x, y, z), args[6:]))


class _Utils:
    def __init__(self, name: str) -> None:
        self.shared_bytes = SHARED_BYTES[name]

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes, "multiprocessor_count": 128}


class OfflineDriver(DriverBase):
    """The methods of a driver that a launch needs."""

    launcher_cls = Launcher

    def __init__(self, name: str) -> None:
        super().__init__()
        self.target = target_of(name)
        self.utils = _Utils(name)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here, so nothing can be timed")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def activate(name: str) -> None:
    """Compile all further kernels for a target."""
    triton.runtime.driver.set_active(OfflineDriver(name))
