"""Conversations with tiny models in any order, beside what eager attention says of each forward: the maps' oracle."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

VOCABULARY, IMAGE, PICTURE_TOKENS, LAYERS, WINDOW = 40, 39, 4, 3, 9
KINDS = ("llama", "mistral")
MASKS = ("none", "2d", "bool", "additive", "biased")
CACHES = ("own", "dynamic", "static", "no cache")
CAPACITY = 40


@cache
def model_of(kind: str, implementation: str) -> Any:
    """A LLaVA of three text layers, full attention (llama) or a sliding window (mistral), and pictures of 4 tokens."""
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
        image_seq_length=PICTURE_TOKENS,
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
    """Ids [B, S] with P pictures a row, columns [B, P * 4] of their tokens, pixels, what is no padding."""

    ids: torch.Tensor
    columns: torch.Tensor
    pixels: torch.Tensor
    attended: torch.Tensor


def prompt_of(seed: int, batch: int, before: int, behind: int, pads: list[int], side: str) -> Prompt:
    """A random prompt; row b has `pads[b]` columns of padding on a side."""
    generator = torch.Generator().manual_seed(seed)
    width, rows, columns, attended = max(pads), [], [], []
    for pad in pads:
        text = torch.randint(1, IMAGE, (before + behind + width - pad,), generator=generator).tolist()
        left = pad if side == "left" else 0
        row = [0] * left + text[:before] + [IMAGE] * PICTURE_TOKENS + text[before:]
        row += [0] * (before + behind + PICTURE_TOKENS + width - len(row))
        rows.append(row)
        columns.append(list(range(left + before, left + before + PICTURE_TOKENS)))
        real = before + behind + PICTURE_TOKENS + width - pad
        attended.append([left <= column < left + real for column in range(len(row))])
    pixels = torch.randn(batch, 1, 3, 28, 28, generator=generator)
    return Prompt(torch.tensor(rows), torch.tensor(columns), pixels, torch.tensor(attended))


@dataclass
class Conversation:
    """A prompt and the tokens behind it; `keys` are, by layer, the columns of the keys that its cache still holds.

    `truths` are eager's maps [B, L, N] of the steps so far. `broken` says why the session cannot know it any more.
    """

    prompt: Prompt
    cache: Any = None
    cached: bool = True
    ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    keys: list[list[int]] = field(default_factory=lambda: [[] for _ in range(LAYERS)])
    truths: list[torch.Tensor] = field(default_factory=list)
    broken: str | None = None
    # Whether its steps so far may have gone over to a repetition of it.
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
    """A bool mask as what eager adds."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def mask_of(name: str, talk: Conversation, new: int, keys: int) -> torch.Tensor | None:
    """The mask of a forward of `new` tokens over `keys` keys, the last of which a buffer has not written yet."""
    if name == "none":
        return None
    attended = talk.attended()
    if name == "2d":
        return attended.long()
    total = attended.shape[1]
    causal = torch.arange(keys) <= torch.arange(total - new, total)[:, None]
    seen = causal & torch.nn.functional.pad(attended, (0, keys - total))[:, None, None]
    if name == "bool":
        return seen
    mask = additive(seen)
    if name == "biased":
        for row, columns in enumerate(talk.prompt.columns):
            mask[row, ..., columns] += 2.0
    return mask


def truth_of(model: Any, talk: Conversation, arguments: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
    """Eager's maps [B, L, N] of rows [B] of a forward, whose cache is left alone; 0 at keys that are gone."""
    own = copy.deepcopy(talk.cache)
    mask = arguments.get("attention_mask")
    given = {**arguments, "past_key_values": own, "output_attentions": True, "return_dict": True}
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.dtype == torch.bool:
        given["attention_mask"] = additive(mask)
    with torch.no_grad():
        attentions = model(**given).attentions
    return gathered(attentions, talk, rows)


def gathered(attentions: Any, talk: Conversation, rows: torch.Tensor) -> torch.Tensor:
    batch = rows.shape[0]
    found = torch.zeros(batch, LAYERS, talk.prompt.columns.shape[1])
    for layer, attention in enumerate(attentions):
        columns = talk.keys[layer]
        keys = attention.shape[-1]
        # A sliding cache hands over its last keys, a buffer more than there are.
        shown = columns[-keys:]
        index = {column: place for place, column in enumerate(shown)}
        for row in range(batch):
            line = attention[row, :, rows[row]].mean(0)
            for place, column in enumerate(talk.prompt.columns[row].tolist()):
                if column in index:
                    found[row, layer, place] = line[index[column]]
    return found
