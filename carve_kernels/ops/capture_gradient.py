"""Capture with gradients: any backend computes the maps, that of `BACKWARD` the gradients from rows computed again."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.backends import resolve_backward
from carve_kernels.types import Capture, CaptureOptions, Given

# Arguments after the query, the key and the sink, which have no gradients.
_WITHOUT = 7


def needs_gradient(query: torch.Tensor, key: torch.Tensor, sink: torch.Tensor | None) -> bool:
    """Whether a capture of these tensors becomes a part of a graph."""
    return torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or (sink is not None and sink.requires_grad)
    )


def with_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    options: CaptureOptions,
    module: Any,
    out: Capture | None = None,
) -> Capture:
    """A capture by a backend's module, with gradients with respect to the query, the key and the sink.

    Kept for the backward are its arguments alone, none of them copied. Gradients of gradients are refused.
    """
    plain = CaptureOptions(options.scale, softcap=options.softcap, window=options.window, heads=options.heads)
    tensors = query, key, options.sink, tokens, options.mask, options.positions, options.lse
    backward = resolve_backward(module, query.device, query.detach(), key.detach(), tokens, options)
    result = Capture(*_Captured.apply(*tensors, plain, module, backward))
    if out is None:
        return result
    for target, values in zip(out, result, strict=True):
        target.copy_(values)
    return out


class _Captured(torch.autograd.Function):
    """The gradients of `capture`; `options` are those without tensors."""

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, sink: torch.Tensor | None, tokens: torch.Tensor,
        mask: torch.Tensor | None, positions: torch.Tensor | None, lse: torch.Tensor | None,
        options: CaptureOptions, module: Any, _backward: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        sink = None if sink is None else sink.detach()
        options = options._replace(mask=mask, positions=positions, sink=sink, lse=lse)
        maps, mass, entropy = module.forward(query.detach(), key.detach(), tokens, options)
        return maps, mass, entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.options, _, ctx.module = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        query, key, sink, tokens, mask, positions, lse = ctx.saved_tensors
        options = ctx.options._replace(mask=mask, positions=positions, sink=sink, lse=lse)
        with torch.no_grad():
            gradients = ctx.module.backward(query, key, tokens, options, Given(*given), of_key=ctx.needs_input_grad[1])
        if not torch.is_grad_enabled():
            return (*gradients, *(None,) * _WITHOUT)
        sources = [each for each in (query, key, sink, *given) if each is not None and each.requires_grad]
        return (*(None if each is None else _Once.apply(each, *sources) for each in gradients), *(None,) * _WITHOUT)


class _Once(torch.autograd.Function):
    """A gradient in a graph (`create_graph=True`), which depends on `sources` in a way that is not known."""

    @staticmethod
    def forward(gradient: torch.Tensor, *_sources: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(_ctx: Any, _inputs: tuple[Any, ...], _output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(_ctx: Any, *_given: torch.Tensor) -> Any:
        raise RuntimeError("capture: expected to be differentiated once, gradients of its gradients are not computed")
