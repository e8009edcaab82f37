"""Which pixel values reach which token of the prompt, with the layers of the vision tower made the identity.

What then remains of the tower treats patches by themselves: embedding, positions, norms, merging, projection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from carve_kernels.hf import names
from carve_kernels.hf.model import decoder_layers, dtype_of, input_device, unwrap
from carve_kernels.hf.processors import TOKEN_TYPES

NOWHERE, SEVERAL = -1, -2
"""Numbers in place of a token's: the value reaches no token, or several."""

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
# Ratios of gradients are powers of two, so exact in every dtype that has the range.
_RANGE = {torch.float16: 4}
_DIGITS = 16


class _Embedded(Exception):
    """Ends a forward at the first text layer."""


class Influence:
    """The embeddings of image tokens as a function of the pixel tensors, as long as the context is open.

    `columns` are the (row, column) of the image tokens, in order.
    """

    def __init__(self, pixels: list[torch.Tensor], embeddings: torch.Tensor, columns: torch.Tensor) -> None:
        self._pixels, self._embeddings, self.columns = pixels, embeddings, columns
        generator = torch.Generator().manual_seed(0)
        self._direction = torch.randn(embeddings.shape[-1], generator=generator).to(embeddings)

    def tokens(self) -> torch.Tensor:
        """For each pixel value the number of the image token that it reaches, NOWHERE or SEVERAL, int64 [E]."""
        base = _RANGE.get(self._embeddings.dtype, _DIGITS)
        count = len(self.columns)
        plain = self.gradient(torch.ones(count))
        reached = plain != 0
        number, clear = torch.zeros(len(plain), dtype=torch.int64), torch.ones(len(plain), dtype=torch.bool)
        ids = torch.arange(count)
        factor = 1
        while factor < count:
            digits = ids // factor % base
            ratio = self.gradient(2.0**digits)[reached].double() / plain[reached].double()
            power = ratio.clamp(min=0.1).log2()
            digit = power.round()
            clear[reached] &= ((power - digit).abs() < 0.02) & (digit >= 0) & (digit < base)
            number[reached] += digit.clamp(0, base - 1).long() * factor
            factor *= base
        clear &= number < count
        number[~reached] = NOWHERE
        number[reached & ~clear] = SEVERAL
        return number

    def gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """The gradient of the weighted sum of the tokens' embeddings, each seen from one direction, on the CPU [E]."""
        given = torch.zeros_like(self._embeddings)
        rows, columns = self.columns.T.to(given.device)
        given[rows, columns] = weights.to(given)[:, None] * self._direction
        gradients = torch.autograd.grad(self._embeddings, self._pixels, given, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                torch.zeros(pixel.numel()) if gradient is None else gradient.flatten().float().cpu()
                for pixel, gradient in zip(self._pixels, gradients, strict=True)
            ]
        )


@contextmanager
def influence(
    model: nn.Module,
    inputs: Mapping[str, Any],
    pixels: list[torch.Tensor],
    fill: Callable[[list[torch.Tensor]], Mapping[str, Any]],
) -> Iterator[Influence]:
    """Run the model on a prompt up to its first text layer, differentiably in the pixel tensors.

    `fill` puts pixel tensors into the entries of the processor. The model is left as it was, also after an error.

    Raises ValueError if the embeddings of the image tokens do not depend on the pixels differentiably.
    """
    inner = unwrap(model)
    device, dtype = input_device(inner), dtype_of(inner) or torch.float32
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(inner))
        stack.enter_context(_local(inner))
        leaves = [pixel.to(device, dtype).clone().requires_grad_() for pixel in pixels]
        entries = _to(fill([leaf.clone() for leaf in leaves]), device)
        embeddings = _embeddings(inner, {**_to(inputs, device), **entries})
        if embeddings is None or not embeddings.requires_grad:
            raise ValueError(
                f"model: the embeddings of the prompt of {inner.config.model_type!r} do not depend on the pixels in a "
                "way that can be measured: it embeds codes of the image, or attends to the image by cross-attention"
            )
        yield Influence(leaves, embeddings, _columns(inner, inputs["input_ids"]))


def _columns(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The (row, column) of each image token."""
    token = names.image_id(unwrap(model).config)
    if token is None:
        raise ValueError(f"model: the config of {unwrap(model).config.model_type!r} names no image token")
    return (input_ids == token).nonzero().cpu()


def _embeddings(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """What the first text layer gets, [B, S, E]."""
    found: list[torch.Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)))
        raise _Embedded

    if TOKEN_TYPES in names.signature_of(model).parameters and TOKEN_TYPES not in inputs:
        # Some processors return them only on demand, and the positions need them.
        inputs = {**inputs, TOKEN_TYPES: (inputs["input_ids"] == names.image_id(model.config)).long()}
    notes = names.position_modules(model)
    handle = decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Embedded:
        pass
    finally:
        handle.remove()
        names.restore_positions(notes)
    return _first_of_several(found[0], inputs["input_ids"].shape) if found else None


def _first_of_several(states: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The states [B, S, E] of tokens that have several, side by side or one set after the other, made of the first."""
    if states.ndim != 4:
        return states
    return states[0] if states.shape[1:3] == shape else states[:, :, 0]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Weights without gradients, and evaluation mode; then only what depends on the pixels requires a gradient."""
    trained = [each for each in model.parameters() if each.requires_grad]
    training = [each for each in model.modules() if each.training]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def _local(model: nn.Module) -> Iterator[None]:
    """Each layer with attention outside of the text decoder returns its input, if that depends on the pixels."""
    text = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    handles = []
    try:
        for stack in model.modules():
            if not isinstance(stack, (nn.ModuleList, nn.Sequential)):
                continue
            for layer in stack:
                if id(layer) not in text and any(_ATTENTION.search(type(each).__name__) for each in layer.modules()):
                    # Before the hooks of transformers, which record what a layer returns.
                    handles.append(layer.register_forward_hook(_identity, with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _identity(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The input in place of the output; a layer that changes the shape, or mixes pixels into queries, stays."""
    given = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
    several = isinstance(output, tuple)
    returned = output[0] if several else output
    if given is None or not given.requires_grad or getattr(returned, "shape", None) != given.shape:
        return None
    return (given, *output[1:]) if several else given


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(inner, device) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to(inner, device) for inner in value]
    return value
