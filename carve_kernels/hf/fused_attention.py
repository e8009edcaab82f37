"""Which attention calls of decode steps one operator can replace, which attends and captures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from carve_kernels.backends import warn_once
from carve_kernels.hf import names


def why_not(
    attention: names.Attention,
    module: nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: Any,
    args: tuple[Any, ...],
    options: names.AttentionOptions,
) -> str | None:
    """Why a call of `attention` is not softmax over the keys that its mask shows, of one row, or None.

    `tensors` are query, key and value, `args` the positional arguments after the mask, whose meaning only the function
    knows.
    """
    implementation = names.implementation_of(module) or ""
    flash = names.is_flash(implementation)
    if not (flash or implementation == "sdpa") or not names.is_own(attention):
        return f"the attention implementation is {implementation}, one of sdpa and FlashAttention can be replaced"
    if args:
        return "the attention is called with positional arguments"
    if tensors[0].shape[2] != 1:
        return "a step has more than one row, as without a cache"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "the output of the attention needs a gradient"
    if options.dropout:
        return "the attention has dropout"
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.dtype != torch.bool:
        return "the mask is added to the logits"
    if not flash and options.beyond_sdpa is not None:
        return f"the attention uses {options.beyond_sdpa}, which sdpa does not support"
    return None


def log_unfused(reason: str) -> None:
    """Log once for each reason that the model's own attention is called, and the capture beside it."""
    # A compiler breaks its graph at a log.
    if not torch.compiler.is_compiling():
        warn_once(
            f"fused: {reason}", f"fused: the model's attention is called, and its rows captured beside it: {reason}"
        )
