"""Scratch between the launches of one call: cached and doubled, so that the steady state allocates nothing."""

from __future__ import annotations

import threading

import torch
import triton


class Workspace(threading.local):
    """Scratch for each thread, device and stream: the kernels of one stream run in order and may share it.

    Two threads on one stream must not, since the launches of their calls can interleave. A buffer that is too small
    returns to torch's allocator, which reuses it on its stream only. A call that is captured into a CUDA graph gets
    separate scratch from the graph's memory: graphs live longer than calls, and several may replay at a time.
    """

    def __init__(self) -> None:
        self._cached: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, device: torch.device, floats: int, tickets: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At least `floats` float32 of any value and `tickets` int32 of 0, which the kernels reset after use."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _allocate(device, floats, tickets)
        owner = (device, _stream(device))
        buffers = self._cached.get(owner)
        if buffers is None or buffers[0].numel() < floats or buffers[1].numel() < tickets:
            doubled = (0, 0) if buffers is None else (2 * buffers[0].numel(), 2 * buffers[1].numel())
            buffers = self._cached[owner] = _allocate(device, max(floats, doubled[0]), max(tickets, doubled[1]))
        return buffers


def _allocate(device: torch.device, floats: int, tickets: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(floats, dtype=torch.float32, device=device),
        torch.zeros(tickets, dtype=torch.int32, device=device),
    )


def _stream(device: torch.device) -> int:
    """The handle of the device's current stream; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream
