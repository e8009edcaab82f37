"""Which devices can be used here, and the error for one that cannot."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.checks import describe


def usable(name: str, value: Any) -> torch.device:
    """The device that a text, a number or a torch.device means, where tensors can be made here.

    Raises TypeError or ValueError that says which devices there are.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name}: expected a device, such as 'cpu', got {describe(value)}")
    try:
        device = torch.device(value)
        # A tensor on meta has no numbers to hand out.
        torch.zeros(1, device=device).item()
    # torch without CUDA asserts; a backend that is not built has no kernels, and some have no module either.
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError, ImportError) as error:
        # What torch knows of all its backends goes on for pages.
        reason = str(error).split("\n")[0][:120]
        raise ValueError(
            f"{name}: {str(value)!r} cannot be used here, expected one of {', '.join(available())} ({reason})"
        ) from error
    return device


def available() -> list[str]:
    """The devices that torch can use here, the CPU first."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found
