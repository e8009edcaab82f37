"""Conversations with tiny models, and the expected maps of each forward from eager attention."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

VOCABULARY, IMAGE, IMAGE_TOKENS, LAYERS, WINDOW = 40, 39, 4, 3, 9
KINDS = ("llama", "mistral")
MASKS = ("none", "2d", "bool", "additive", "biased")
CACHES = ("own", "dynamic", "static", "no cache")
CAPACITY = 40


@cache
def model_of(kind: str, implementation: str) -> Any:
    """A LLaVA of three text layers, full attention (llama) or a sliding window (mistral), and 4 tokens per image."""
    import transformers

    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=14,
        ),
        text_config=(
            transformers.LlamaConfig(**text)
            if kind == "llama"
            else transformers.MistralConfig(**text, sliding_window=WINDOW)
        ),
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    model.set_attn_implementation(implementation)
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [IMAGE]
    return model


@dataclass
class Prompt:
    """Ids [B, S] with P images a row, columns [B, P * 4] of their tokens, pixels, and the columns without padding."""

    ids: torch.Tensor
    columns: torch.Tensor
    pixels: torch.Tensor
    attended: torch.Tensor


def prompt_of(seed: int, batch: int, before: int, after: int, pads: list[int], side: str) -> Prompt:
    """A random prompt; row b has `pads[b]` columns of padding on one side."""
    generator = torch.Generator().manual_seed(seed)
    width, rows, columns, attended = max(pads), [], [], []
    for pad in pads:
        text = torch.randint(1, IMAGE, (before + after + width - pad,), generator=generator).tolist()
        left = pad if side == "left" else 0
        row = [0] * left + text[:before] + [IMAGE] * IMAGE_TOKENS + text[before:]
        row += [0] * (before + after + IMAGE_TOKENS + width - len(row))
        rows.append(row)
        columns.append(list(range(left + before, left + before + IMAGE_TOKENS)))
        length = before + after + IMAGE_TOKENS + width - pad
        attended.append([left <= column < left + length for column in range(len(row))])
    pixels = torch.randn(batch, 1, 3, 28, 28, generator=generator)
    return Prompt(torch.tensor(rows), torch.tensor(columns), pixels, torch.tensor(attended))


@dataclass
class Conversation:
    """A prompt and its new tokens; `keys` are the columns of the keys in its cache, by layer.

    `expected` are eager's maps [B, L, N] of the steps so far. `broken` says why the session must refuse it.
    """

    prompt: Prompt
    cache: Any = None
    cached: bool = True
    ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    keys: list[list[int]] = field(default_factory=lambda: [[] for _ in range(LAYERS)])
    expected: list[torch.Tensor] = field(default_factory=list)
    broken: str | None = None
    # Whether its steps so far may have moved to a repetition of it.
    loose: bool = False

    def attended(self) -> torch.Tensor:
        more = self.ids.shape[1] - self.prompt.attended.shape[1]
        return torch.nn.functional.pad(self.prompt.attended, (0, max(0, more)), value=True)[:, : self.ids.shape[1]]


def new_cache(name: str, model: Any) -> Any:
    from transformers import DynamicCache, StaticCache

    if name == "dynamic":
        return DynamicCache()
    return StaticCache(config=model.config.get_text_config(), max_cache_len=CAPACITY) if name == "static" else None


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask as an additive one."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def mask_of(name: str, talk: Conversation, new: int, keys: int) -> torch.Tensor | None:
    """The mask of a forward of `new` tokens over `keys` keys, the last of which may be unwritten."""
    if name == "none":
        return None
    attended = talk.attended()
    if name == "2d":
        return attended.long()
    total = attended.shape[1]
    causal = torch.arange(keys) <= torch.arange(total - new, total)[:, None]
    visible = causal & torch.nn.functional.pad(attended, (0, keys - total))[:, None, None]
    if name == "bool":
        return visible
    mask = additive(visible)
    if name == "biased":
        for row, columns in enumerate(talk.prompt.columns):
            mask[row, ..., columns] += 2.0
    return mask


def expected_maps(model: Any, talk: Conversation, arguments: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
    """Eager's maps [B, L, N] of rows [B] of a forward, with a copy of its cache; 0 at missing keys."""
    cache = copy.deepcopy(talk.cache)
    mask = arguments.get("attention_mask")
    given = {**arguments, "past_key_values": cache, "output_attentions": True, "return_dict": True}
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.dtype == torch.bool:
        given["attention_mask"] = additive(mask)
    with torch.no_grad():
        attentions = model(**given).attentions
    return gather_maps(attentions, talk, rows)


def gather_maps(attentions: Any, talk: Conversation, rows: torch.Tensor) -> torch.Tensor:
    """The maps [B, L, N] of rows [B] in attentions of all layers."""
    batch = rows.shape[0]
    maps = torch.zeros(batch, LAYERS, talk.prompt.columns.shape[1])
    for layer, attention in enumerate(attentions):
        columns = talk.keys[layer]
        keys = attention.shape[-1]
        # A sliding cache passes its last keys, a static one more keys than there are tokens.
        index = {column: number for number, column in enumerate(columns[-keys:])}
        for row in range(batch):
            line = attention[row, :, rows[row]].mean(0)
            for number, column in enumerate(talk.prompt.columns[row].tolist()):
                if column in index:
                    maps[row, layer, number] = line[index[column]]
    return maps
