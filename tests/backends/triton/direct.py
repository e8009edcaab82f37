"""Launch capture through a stub of the driver and print its arguments, in a process without the interpreter.

python -m tests.backends.triton.direct        JSON: for each call, what was compiled and what each launch was given
"""

from __future__ import annotations

import json
from typing import Any

import torch

from carve_kernels.backends.native.scratch import Memory, ScratchNeeds
from carve_kernels.backends.triton import capture
from carve_kernels.backends.triton.capture_kernels import (
    capture_map_kernel,
    capture_reread_kernel,
    capture_scores_kernel,
)
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot
from tests.backends.triton import offline_driver

KERNELS = (capture_scores_kernel, capture_map_kernel, capture_reread_kernel)


def given(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments as numbers: tensors by their addresses."""
    flat: list[Any] = []
    for one in arguments:
        if isinstance(one, tuple):
            flat.append(given(one))
        else:
            flat.append(one.data_ptr() if isinstance(one, torch.Tensor) else one)
    return flat


def launched(call: Any) -> dict[str, Any]:
    """How many kernels a call compiles, whether it passes tensors, and what its launches are given."""
    offline_driver.Launcher.launches.clear()
    before = sum(len(kernel._compiled) for kernel in KERNELS)
    call()
    found = offline_driver.Launcher.launches
    return {
        "compiled": sum(len(kernel._compiled) for kernel in KERNELS) - before,
        "tensors": any(isinstance(one, torch.Tensor) for _, _, arguments in found for one in arguments),
        "launches": [[name, grid, given(arguments)] for name, grid, arguments in found],
    }


def calls() -> dict[str, Any]:
    storage = torch.zeros(2 * 400 * 16 + 1, dtype=torch.bfloat16)
    query = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
    key, shifted = (storage[start:][: 2 * 400 * 16].view(1, 2, 400, 16) for start in (0, 1))
    tokens = torch.zeros(1, 7, dtype=torch.int32)
    out = Capture(torch.empty(1, 1, 7), torch.empty(1, 1), torch.empty(1, 1))
    mask = torch.ones(1, 1, 1, 400, dtype=torch.bool)
    memory = Memory.new(ScratchNeeds(1 << 16, 64), query.device)

    def forward(
        key: torch.Tensor = key, tokens: torch.Tensor = tokens, scale: float = 0.125, out: Capture = out, **options: Any
    ) -> Any:
        layers, asked = Layers.single(query, key, None), CaptureOptions(scale, **options)
        return lambda: capture.forward_layers(layers, tokens, asked, Slot(out), None, memory)

    first_three = Capture(out.maps[..., :1], out.mass, out.entropy)
    return {
        "first": forward(),
        "again": forward(),
        # Sizes, strides and scales of every kind that Triton specialises: 1, multiples of 16 and others.
        "other numbers": forward(key[:, :, :17], tokens[:, :1], scale=1.0, out=first_three),
        "other keys": forward(key[:, :, :352]),
        "a shifted key": forward(shifted),
        "a mask": forward(mask=mask),
        "long tokens": forward(tokens=tokens.long()),
        "a known lse": forward(lse=torch.zeros(1, 4, 1)),
        "a known lse again": forward(lse=torch.zeros(1, 4, 1)),
    }


if __name__ == "__main__":
    offline_driver.activate("90")
    print(json.dumps({name: launched(call) for name, call in calls().items()}))
