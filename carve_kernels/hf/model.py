"""Finding one's way in a model: through wrappers, to its text decoder, to the attention of each layer, to devices."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from carve_kernels.hf import foreign, names


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside torch.compile, DDP and PEFT wrappers.

    Raises TypeError if there is none.
    """
    inner: nn.Module | None = model
    # A transformers model has children of the wrappers' names as well, so the search ends at the first one.
    while not isinstance(inner, PreTrainedModel):
        inner = names.wrapped(inner) if isinstance(inner, nn.Module) else None
        if inner is None:
            raise TypeError(f"model: expected a transformers model or a wrapper of one, got {type(model).__name__}")
    return inner


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The modules around the transformers model, outermost first."""
    around, inner = [], model
    while not isinstance(inner, PreTrainedModel):
        around.append(inner)
        inner = names.wrapped(inner)  # type: ignore[assignment]
    return around


def text_backbone(model: nn.Module) -> PreTrainedModel:
    """The text decoder: the module whose `layers` read the tokens.

    Raises TypeError if the model has none.
    """
    decoder = unwrap(names.inner_decoder(unwrap(model)))
    while names.layers_in(decoder) is None:
        inner = unwrap(names.inner_decoder(decoder))
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
    types = names.types_of_layers(getattr(backbone, "config", None))
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        if types is not None and names.is_recurrent(types[number]):
            continue
        attention = names.attention_in(layer)
        if attention is not None:
            found[number] = attention
    return found


def check_decoder(model: nn.Module) -> None:
    """Raises TypeError for a model whose answers do not come by self-attention over the columns of its prompt."""
    inner = unwrap(model)
    kind = type(inner).__name__
    if names.has_encoder(inner):
        raise TypeError(
            f"model: expected a decoder alone, got {kind}, an encoder and a decoder, whose decoder does not attend to "
            "the prompt by self-attention"
        )
    crossing = names.cross_attention_in(text_backbone(model))
    if crossing is not None:
        raise TypeError(
            f"model: expected a decoder that reads image tokens by self-attention, got {kind}, whose {crossing} looks "
            "at the image by cross-attention, of which no maps are made; use a model whose prompt holds image tokens"
        )
    if any(names.has_virtual_tokens(each) for each in (*wrappers(model), inner)):
        raise TypeError(
            "model: expected a model whose prompt begins where its input_ids do, got one with an adapter that puts "
            "tokens of its own before them (prompt learning); give the model without it, or a LoRA"
        )


def check_steady(model: nn.Module) -> None:
    """Raises ValueError for a model that drops numbers at random: nothing of it would come a second time."""
    for name, module in unwrap(model).named_modules():
        if module.training and names.dropout_of(module):
            raise ValueError(
                f"model: expected a model that computes the same each time, got one in training mode, whose {name} "
                f"drops {names.dropout_of(module):.0%}; call model.eval()"
            )


def devices_of(module: nn.Module) -> set[torch.device]:
    """Where the parts of a module run: where accelerate brings them, else where their weights are.

    Weights that are parked say nothing; a module of such ones alone runs where it is called.
    """
    devices: set[torch.device] = set()
    for each in module.modules():
        told = foreign.execution_device(each)
        if told is not None and any(True for _ in each.parameters(recurse=False)):
            devices.add(told)
        elif told is None:
            devices |= {weight.device for weight in each.parameters(recurse=False) if weight.device.type != "meta"}
    return devices


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its embedding runs.

    Raises ValueError if the model's weights are nowhere.
    """
    inner = unwrap(model)
    for module in (inner.get_input_embeddings(), inner):
        devices = devices_of(module)
        if devices:
            return min(devices, key=str)
    raise ValueError(
        f"model: expected weights on a device, got {type(inner).__name__} on the meta device, and no hook of "
        "accelerate that brings them; load its weights"
    )


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
    ids = names.visual_ids(config)
    if not ids:
        raise ValueError(f"model: the config of model_type {config.model_type!r} names no image token; give the tokens")
    marks = torch.tensor(ids, device=input_ids.device)
    return [row.nonzero().flatten().to(torch.int32) for row in torch.isin(input_ids, marks)]
