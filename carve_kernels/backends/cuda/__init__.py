"""The CUDA backend: compiled kernels from the extension in the package's folder, where a GPU can run them."""

from __future__ import annotations

import functools

import torch

from carve_kernels.backends.native import extension

# The namespace of the operators.
operators = torch.ops.carve_kernels

_NVCC = "with nvcc on the path, or in CUDACXX or CUDA_HOME"


def devices() -> tuple[str, ...]:
    return ("cuda",)


@functools.cache
def unavailable() -> str | None:
    """Why no GPU here can run the kernels, and the command that fixes it, or None."""
    reason = extension.unavailable()
    if reason is not None:
        return reason
    if not extension.architectures():
        return f"the extension was built without CUDA kernels; {extension.install_command()} {_NVCC}"
    if not torch.cuda.is_available():
        need = "NVIDIA's driver" if torch.version.cuda else "NVIDIA's driver and a CUDA build of torch"
        return f"torch {torch.__version__} sees no GPU; install {need}, and see that nvidia-smi lists one"
    reasons = [foreign(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.cache
def foreign(device: int) -> str | None:
    """Why a GPU cannot run the compiled kernels, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    compiled = extension.architectures()
    # A kernel runs on later minor versions of its architecture; the last is also there as PTX, for all later ones.
    if any(one // 10 == major and one % 10 <= minor for one in compiled) or 10 * major + minor >= compiled[-1]:
        return None
    name = torch.cuda.get_device_name(device)
    names = ", ".join(f"sm_{one}" for one in compiled)
    return (
        f"{name} is sm_{major}{minor}, and the compiled kernels are for {names}; "
        f"CARVE_KERNELS_CUDA_ARCHITECTURES={major}{minor} {extension.install_command()} {_NVCC}"
    )
