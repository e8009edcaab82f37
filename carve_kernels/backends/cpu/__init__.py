"""The CPU backend: compiled C++ operators from the extension in the package's folder."""

from __future__ import annotations

import functools

import torch

from carve_kernels.backends.native import extension

# The sets of instructions that the kernels are compiled for, in the order of carve::Isa.
ISAS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")


def devices() -> tuple[str, ...]:
    return ("cpu",)


@functools.cache
def unavailable() -> str | None:
    """Why the extension is unavailable, and the command that fixes it, or None."""
    reason = extension.unavailable()
    if reason is not None:
        return f"{extension.SLOWER}; {reason}"
    isa()  # a wrong CARVE_KERNELS_CPU is an error at once, not a reason to use another backend
    return None


def isa() -> tuple[str, str]:
    """The instructions in use, which CARVE_KERNELS_CPU may select, and the best of this machine."""
    out = torch.empty(2, dtype=torch.int64, device="cpu")
    try:
        torch.ops.carve_kernels.isa_cpu(-2, out)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    used, best = out.tolist()
    return ISAS[used], ISAS[best]
