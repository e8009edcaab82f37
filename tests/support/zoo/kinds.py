"""The kinds of models in the zoo, and how to build one."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import transformers

# One vocabulary for all kinds: image and video tokens, tokens around them, and the end of a row of patches.
IMAGE, VIDEO, START, END, BREAK = 300, 301, 302, 303, 304
VOCABULARY = 400
FILES = ("grids", "fixed", "tiles", "queries", "others")


class Example(NamedTuple):
    config: Any
    inputs: dict[str, torch.Tensor]
    columns: list[int]


class Kind(NamedTuple):
    """A model class, the first tested version that has it, and what a session does with it.

    `refused` and `generate_refused` match the error that a session raises; None if its maps equal eager's. `broken_in`
    names a release in which the class itself fails with an image.
    """

    name: str
    class_name: str
    make: Callable[[], Example]
    since: str
    refused: str | None
    generate_refused: str | None
    broken_in: str | None

    def exists(self) -> bool:
        return hasattr(transformers, self.class_name)


_KINDS: dict[str, Kind] = {}


def kind(
    class_name: str,
    *,
    since: str = "5.12",
    refused: str | None = None,
    generate_refused: str | None = None,
    broken_in: str | None = None,
) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    """Add a function that returns a config, inputs and columns of image tokens to the zoo, under its name."""

    def add(make: Callable[[], Example]) -> Callable[[], Example]:
        name = make.__name__
        _KINDS[name] = Kind(name, class_name, make, since, refused, generate_refused or refused, broken_in)
        return make

    return add


def kinds() -> dict[str, Kind]:
    """All kinds by name, including those whose class the installed version lacks."""
    for file in FILES:
        import_module(f"tests.support.zoo.{file}")
    return _KINDS


def build(name: str, seed: int = 0) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    """The model under sdpa in float32, its inputs, and the columns of its image tokens; deterministic."""
    selected = kinds()[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config, inputs, columns = selected.make()
        model = getattr(transformers, selected.class_name)(config).float().eval()
    set_text_attention(model, "sdpa")
    _fill(model, name, seed)
    settings = model.generation_config
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = 0, 1, None
    return model, inputs, columns


def set_text_attention(model: Any, implementation: str) -> None:
    """Switch the text model only: another implementation in the vision tower would change the features."""
    name = "text_config" if "text_config" in model.config.sub_configs else ""
    model.set_attn_implementation({name: implementation})


def text(**settings: Any) -> dict[str, Any]:
    """The settings of a text model of four layers; None removes one."""
    common = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {name: value for name, value in (common | settings).items() if value is not None}


def vision(**settings: Any) -> dict[str, Any]:
    """The settings of a vision tower with 4 x 4 patches; None removes one."""
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    return {name: value for name, value in (common | settings).items() if value is not None}


def config(model_type: str, **settings: Any) -> Any:
    return transformers.CONFIG_MAPPING[model_type](**settings)


def example(
    settings: Any,
    count: int,
    pixels: dict[str, torch.Tensor],
    *,
    before: tuple[int, ...] = (1, 5, 6, 7),
    start: int | None = None,
    end: int | None = None,
    token: int = IMAGE,
    row: int | None = None,
    types: str | None = None,
) -> Example:
    """A prompt with `count` image tokens and a break after each `row` of them; the input named `types` marks them."""
    ids = [*before, *([] if start is None else [start])]
    columns: list[int] = []
    for _ in range(1 if row is None else count // row):
        columns += range(len(ids), len(ids) + (row or count))
        ids += [token] * (row or count) + ([] if row is None else [BREAK])
    ids += [*([] if end is None else [end]), *range(10, 22)]
    tokens = torch.tensor([ids])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **pixels}
    if types is not None:
        inputs[types] = (tokens == token).int()
    return Example(settings, inputs, columns)


def _fill(model: Any, name: str, seed: int) -> None:
    """Weights that keep activations near 1 and attention peaked, so that a wrong map is far off."""
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            in_tower = "visual" in parameter_name or "vision" in parameter_name
            if not in_tower and any(norm in parameter_name for norm in ("q_norm", "k_norm", "layernorm_q")):
                parameter.data.fill_(0.5 if "gemma" in name else 1.6)
            continue
        scale = (parameter.shape[-1] if parameter.ndim == 3 else math.prod(parameter.shape[1:])) ** -0.5
        if "embed_tokens" in parameter_name or "wte" in parameter_name:
            scale = 1.0
        elif any(name in parameter_name for name in (".q_proj", ".k_proj", "qkv", "query_key_value")):
            scale *= 1.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
