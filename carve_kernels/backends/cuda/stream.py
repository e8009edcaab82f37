"""The stream that a launch goes to."""

from __future__ import annotations

import torch


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream; the tests' tensors, on a CPU, have none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
