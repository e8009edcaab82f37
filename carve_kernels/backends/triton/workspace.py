"""Scratch between the launches of one call: kept and grown, so that the steady state allocates nothing."""

from __future__ import annotations

import threading

import torch
import triton


class Workspace(threading.local):
    """Scratch for each thread, device and stream: kernels on one stream follow each other and may share it.

    Two threads on one stream may not, since the launches of their calls can interleave. A buffer that is outgrown goes
    back to torch's allocator, which reuses it on its own stream only. A call that is captured into a CUDA graph gets
    scratch of its own from the graph's memory: graphs live longer than the calls, and several may replay at a time.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, device: torch.device, floats: int, tickets: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At least so many float32 of any value, and so many int32 that are 0; whoever counts in them clears them."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _allocate(device, floats, tickets)
        key = (device, _stream(device))
        kept = self._kept.get(key)
        if kept is None or kept[0].numel() < floats or kept[1].numel() < tickets:
            grown = (0, 0) if kept is None else (2 * kept[0].numel(), 2 * kept[1].numel())
            kept = self._kept[key] = _allocate(device, max(floats, grown[0]), max(tickets, grown[1]))
        return kept


def _allocate(device: torch.device, floats: int, tickets: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(floats, dtype=torch.float32, device=device),
        torch.zeros(tickets, dtype=torch.int32, device=device),
    )


def _stream(device: torch.device) -> int:
    """The handle of the device's current stream; a CPU has one."""
    if device.type == "cpu":
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream
