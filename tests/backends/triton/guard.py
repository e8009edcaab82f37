"""Guard bands: tensors inside larger storage, so that reads and writes beyond them are detected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carve_kernels.backends.native.scratch import Memory, ScratchNeeds

# More elements than a block of any kernel covers beyond its last row.
BAND = 4096


class Guards:
    """Tensors with bands around them and poison between their strides.

    A kernel that reads a band computes garbage; `check` names one that writes to it.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def put(self, name: str, tensor: torch.Tensor, *, written: bool = False) -> torch.Tensor:
        """A tensor of the same sizes, strides and values; `written` where kernels may change the values."""
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = 1 + span if tensor.numel() else 0
        storage = torch.full((extent + 2 * BAND,), _poison(tensor.dtype, written), dtype=tensor.dtype)
        inside = storage.as_strided(tensor.shape, tensor.stride(), BAND)
        inside.copy_(tensor)
        ours = torch.zeros(storage.shape, dtype=torch.bool)
        if written:
            ours.as_strided(tensor.shape, tensor.stride(), BAND).fill_(True)
        self._kept.append((name, storage, storage.clone(), ours))
        return inside

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory to write to, full of NaN."""
        return self.put(name, torch.full(shape, _poison(dtype, written=False), dtype=dtype), written=True)

    def check(self) -> None:
        """Fail for every tensor that was written outside its elements."""
        for name, storage, before, ours in self._kept:
            same = (storage == before) | ((storage != storage) & (before != before)) | ours
            assert bool(same.all()), f"{name}: written at {(~same).nonzero().flatten()[:4].tolist()}, band {BAND}"


def _poison(dtype: torch.dtype, written: bool) -> Any:
    """NaN next to inputs; next to outputs a number that no kernel stores, since a NaN over a NaN would be missed."""
    if dtype.is_floating_point:
        return -1.25e4 if written else float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max // 2


def guard_allocations(guards: Guards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give guarded memory to `Tensor.new_empty` and to the scratch of backends."""
    shipped = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        if "device" in options:
            # The interpreter's copies of the arguments.
            return shipped(self, *shape, **options)
        sizes = tuple(shape[0]) if isinstance(shape[0], (tuple, list, torch.Size)) else shape
        return guards.new("output", sizes, options.get("dtype", self.dtype))

    def new(needs: ScratchNeeds, _device: torch.device) -> Memory:
        scratch = guards.new("scratch", (needs.bytes // torch.float32.itemsize,), torch.float32)
        tickets = guards.put("tickets", torch.zeros(needs.tickets, dtype=torch.int32), written=True)
        return Memory(scratch.view(torch.uint8), tickets)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(Memory, "new", new)
