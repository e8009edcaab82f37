"""Finding one's way in a model: through wrappers to the model, to its text decoder, to the attention of each layer."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel

# torch.compile, DDP and DataParallel, PEFT's outer and inner wrapper. A transformers model has children of the last two
# names as well, so the search ends at the first transformers model.
_WRAPPED = ("_orig_mod", "module", "base_model", "model")

_RECURRENT_LAYERS = ("linear_attention", "mamba", "conv", "moe")
_ATTENTION = re.compile(r"^(?!.*(Linear|Lightning|Cross)).*Attention", re.IGNORECASE)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside torch.compile, DDP and PEFT wrappers.

    Raises TypeError if there is none.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        children = inner._modules if isinstance(inner, nn.Module) else {}
        wrapped = next((children[name] for name in _WRAPPED if children.get(name) is not None), None)
        if wrapped is None:
            raise TypeError(f"model: expected a transformers model or a wrapper of one, got {type(model).__name__}")
        inner = wrapped
    return inner


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The modules around the transformers model, outermost first."""
    around, inner = [], model
    while not isinstance(inner, PreTrainedModel):
        around.append(inner)
        inner = next(inner._modules[name] for name in _WRAPPED if inner._modules.get(name) is not None)  # type: ignore[assignment]
    return around


def text_backbone(model: nn.Module) -> PreTrainedModel:
    """The text decoder: the module whose `layers` read the tokens.

    Raises TypeError if the model has none.
    """
    decoder = unwrap(unwrap(model).get_decoder())
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        inner = unwrap(decoder.get_decoder())
        if inner is decoder:
            raise TypeError(f"model: found no text decoder with `layers` in {type(unwrap(model)).__name__}")
        decoder = inner
    return decoder


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the text decoder, first to last."""
    layers: nn.ModuleList = text_backbone(model).layers  # type: ignore[assignment]
    return layers


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention module of each text layer that has softmax attention, by the layer's number."""
    backbone = text_backbone(model)
    types = getattr(getattr(backbone, "config", None), "layer_types", None)
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        if types is not None and types[number] in _RECURRENT_LAYERS:
            continue
        attention = _attention_of(layer)
        if attention is not None:
            found[number] = attention
    return found


def image_token_positions(model: nn.Module, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """Where the image and video tokens of each row stand, by the ids in the model's config.

    =========  =====  ======  =============================================
    name       dtype  shape   meaning
    =========  =====  ======  =============================================
    input_ids  int    [B, S]  the padded token ids
    returns    int32  [n] * B  absolute positions in each row, ascending
    =========  =====  ======  =============================================

    Raises ValueError if the config names no image token.
    """
    config = unwrap(model).config
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = {getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if not ids:
        raise ValueError(f"model: the config of model_type {config.model_type!r} names no image token; give the tokens")
    marks = torch.tensor(sorted(ids), device=input_ids.device)
    return [row.nonzero().flatten().to(torch.int32) for row in torch.isin(input_ids, marks)]


def _attention_of(layer: nn.Module) -> nn.Module | None:
    modules = (module for name, module in layer.named_modules() if name)
    return next((module for module in modules if _ATTENTION.match(type(module).__name__)), None)
