"""The devices that can be used here, and the error for one that cannot."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.checks import describe


def usable(name: str, value: Any) -> torch.device:
    """The device of a text, a number or a torch.device, after a tensor was created on it.

    Raises TypeError or ValueError that lists the devices of this machine.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name}: expected a device, such as 'cpu', got {describe(value)}")
    try:
        device = torch.device(value)
        # A tensor on meta has no values, so that item() fails.
        torch.zeros(1, device=device).item()
    # torch without CUDA asserts; a device type that is not built lacks kernels or even its module.
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError, ImportError, ValueError) as error:
        # torch lists all its device types, over pages.
        reason = str(error).split("\n")[0][:120]
        given = describe(value) if isinstance(value, int) else repr(str(value))
        raise ValueError(
            f"{name}: {given} cannot be used here, expected one of {', '.join(available())} ({reason})"
        ) from error
    return device


def available() -> list[str]:
    """The devices that torch can use here, the CPU first."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names
