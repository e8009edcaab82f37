"""Scratch between the launches of one call: cached, so that the steady state allocates nothing."""

from __future__ import annotations

import threading

import torch


class Scratch(threading.local):
    """Memory for each thread, device and stream: the kernels of one stream run in order and may share it.

    Two threads on one stream must not, since the launches of their calls can interleave. Memory that is too small, or
    of a thread that has ended, returns to torch's allocator, which reuses it in the order of its stream. A call that is
    captured into a CUDA graph gets memory from the graph's pool: graphs live longer than calls, and several may replay
    at a time.
    """

    def __init__(self, dtype: torch.dtype, *, zeroed: bool = False) -> None:
        self.cached: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._dtype, self._zeroed = dtype, zeroed

    def take(self, device: torch.device, stream: int, needed: int) -> torch.Tensor:
        """At least `needed` elements of any value or, `zeroed`, of 0, which the kernels reset after use."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._allocate(device, needed)
        scratch = self.cached.get((device, stream))
        if scratch is None or scratch.numel() < needed:
            # A tensor made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                scratch = self.cached[device, stream] = self._allocate(device, 1 << (needed - 1).bit_length())
        return scratch

    def _allocate(self, device: torch.device, size: int) -> torch.Tensor:
        return (torch.zeros if self._zeroed else torch.empty)(size, dtype=self._dtype, device=device)
