"""Numbers that several layers compute in the same way."""

from __future__ import annotations

import torch


def entropy(maps: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """H / ln N of maps [B, ..., N] over the used tokens [B, N]; 0 where fewer than two are used or the mass is 0."""
    mass = maps.sum(-1, keepdim=True)
    share = maps / mass.masked_fill(mass == 0, 1.0)
    if share.requires_grad:
        # The slope of -x ln x is infinite at 0, and 0 times it NaN; at 1 the value is the same.
        share = share.masked_fill(share == 0, 1.0)
    total = torch.special.entr(share).sum(-1)
    count = used.sum(-1).to(maps.dtype).view(-1, *[1] * (total.ndim - 1))
    return torch.where(count > 1, total / torch.log(count.clamp(min=2.0)), 0.0)


def float64_device(device: torch.device) -> torch.device:
    """The device for float64 results of tensors on a device: the same one, or the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
