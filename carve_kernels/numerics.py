"""Numbers that several layers compute in the same way."""

from __future__ import annotations

import torch

from carve_kernels.types import Given


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


def of_probabilities(picked: torch.Tensor, used: torch.Tensor, heads: str, given: Given) -> torch.Tensor:
    """The gradients [B, A or 1, R, N] with respect to captured probabilities [B, A, R, N]; `used`: bool [B, 1, N]."""
    maps, mass, entropy = given
    mean = picked.mean(1)
    of_mean = torch.zeros_like(mean)
    if maps is not None and heads == "mean":
        of_mean = of_mean + maps
    if mass is not None:
        of_mean = of_mean + mass[..., None]
    if entropy is not None:
        of_mean = of_mean + entropy[..., None] * _slope_of_entropy(mean, used)
    of_each = (of_mean / picked.shape[1])[:, None]
    return of_each + maps if maps is not None and heads == "each" else of_each


def _slope_of_entropy(mean: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """The gradients [B, R, N] of `numerics.entropy`; 0 at a mean of 0, where they are infinite.

    They are multiplied by the probabilities, and x ln x is 0 at 0.
    """
    total = mean.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    share = mean / total
    spread = torch.special.entr(share).sum(-1, keepdim=True)
    count = used.sum(-1, keepdim=True).to(mean.dtype)
    slope = (torch.log(share.masked_fill(share == 0, 1.0)) + spread).neg() / (total * torch.log(count.clamp(min=2.0)))
    return torch.where((count > 1) & (share != 0), slope, 0.0)


def float64_device(device: torch.device) -> torch.device:
    """The device for float64 results of tensors on a device: the same one, or the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
