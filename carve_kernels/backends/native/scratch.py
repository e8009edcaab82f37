"""The memory that the kernels of a call share: how much it is, and its allocation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from carve_kernels import checks


class ScratchNeeds(NamedTuple):
    """The bytes of a call's scratch and the number of its tickets."""

    bytes: int
    tickets: int


class Memory(NamedTuple):
    """Scratch of any contents, uint8 [bytes], and tickets, int32: 0 before and after every call."""

    scratch: torch.Tensor
    tickets: torch.Tensor

    @classmethod
    def new(cls, needs: ScratchNeeds, device: torch.device) -> Memory:
        scratch = torch.empty(needs.bytes, dtype=torch.uint8, device=device)
        if not needs.tickets:
            return cls(scratch, torch.empty(0, dtype=torch.int32, device=device))
        return cls(scratch, torch.zeros(needs.tickets, dtype=torch.int32, device=device))


NONE = ScratchNeeds(0, 0)


def no_scratch(**_sizes: Any) -> ScratchNeeds:
    """The needs of a backend that uses no scratch."""
    return NONE


def check_memory(memory: Memory, needs: ScratchNeeds) -> None:
    """Refuse memory that is too small for a call."""
    scratch, tickets = memory
    if scratch.dtype != torch.uint8 or not scratch.is_contiguous():
        raise TypeError(f"scratch: expected contiguous torch.uint8, got {checks.describe(scratch)}")
    if scratch.numel() < needs.bytes:
        raise ValueError(f"scratch: expected at least {needs.bytes} bytes, got {scratch.numel()}")
    if tickets.dtype != torch.int32 or not tickets.is_contiguous():
        raise TypeError(f"tickets: expected contiguous torch.int32, got {checks.describe(tickets)}")
    if tickets.numel() < needs.tickets:
        raise ValueError(f"tickets: expected at least {needs.tickets}, got {tickets.numel()}")
