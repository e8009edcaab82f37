"""The training forward: several questions after one image prefix, in bfloat16, compiled block by block.

It runs the weights of the transformers model and equals its forward (the smoke mode checks that); only the packing, the
block mask and the attention differ, which is where the time goes on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from model import HEADS, ID, WIDTH
from torch import Tensor
from torch.nn import functional as F

QUESTIONS = 6
QUESTION_WIDTH = 5
GENERAL_WIDTH = 19
SUFFIX = QUESTIONS * QUESTION_WIDTH + GENERAL_WIDTH
HEAD_SIZE = WIDTH // HEADS


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention; sdpa's masked backward took half of a training step on a CPU."""
    scores = (query * HEAD_SIZE**-0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = scores.float().softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).flatten(2)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def tower_block(layer: Any, hidden: Tensor) -> Tensor:
    """One CLIP layer."""
    attention = layer.self_attn
    x = layer.layer_norm1(hidden)
    mixed = _attend(_heads(attention.q_proj(x)), _heads(attention.k_proj(x)), _heads(attention.v_proj(x)), None)
    hidden = hidden + attention.out_proj(mixed)
    x = layer.mlp.fc1(layer.layer_norm2(hidden))
    return hidden + layer.mlp.fc2(x * torch.sigmoid(1.702 * x))


def text_block(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, first: int) -> Tensor:
    """One Llama layer for the rows from `first` on; the last layer needs no row of the prefix."""
    attention = layer.self_attn
    x = F.rms_norm(hidden, (WIDTH,), layer.input_layernorm.weight, 1e-6)
    query = _rotate(_heads(attention.q_proj(x[:, first:])), cos[first:], sin[first:])
    key = _rotate(_heads(attention.k_proj(x)), cos, sin)
    mixed = _attend(query, key, _heads(attention.v_proj(x)), mask[first:])
    hidden = hidden[:, first:] + attention.o_proj(mixed)
    x = F.rms_norm(hidden, (WIDTH,), layer.post_attention_layernorm.weight, 1e-6)
    return hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))


class Runner:
    """The two halves of the training forward over a LlavaForConditionalGeneration."""

    def __init__(self, model: Any, compiled: bool = True) -> None:
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.language = model.model.language_model
        self.tower_block = torch.compile(tower_block, dynamic=False) if compiled else tower_block
        self.text_block = torch.compile(text_block, dynamic=False) if compiled else text_block
        self._plans: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def encode(self, pixels: Tensor) -> Tensor:
        """The projected patches [B, GRID * GRID, WIDTH] of images [B, 3, 96, 96]."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        for layer in self.tower.encoder.layers:
            hidden = self.tower_block(layer, hidden)
        return self.projector(hidden[:, 1:])

    def _plan(self, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotations and additive mask of a prefix followed by branches that do not attend to each other."""
        if prefix not in self._plans:
            lengths = [QUESTION_WIDTH] * QUESTIONS + [GENERAL_WIDTH]
            branch = torch.cat([torch.zeros(prefix)] + [torch.full((n,), i + 1.0) for i, n in enumerate(lengths)])
            position = torch.cat([torch.arange(prefix)] + [prefix + torch.arange(n) for n in lengths])
            order = torch.arange(len(branch))
            visible = ((branch == 0) | (branch == branch[:, None])) & (order <= order[:, None])
            mask = torch.zeros(visible.shape).masked_fill(~visible, -1e4)
            cos, sin = self.language.rotary_emb(torch.zeros(1), position[None])
            self._plans[prefix] = (cos[0], sin[0], mask)
        return self._plans[prefix]

    def answer(self, patches: Tensor, suffix: Tensor) -> Tensor:
        """Logits [B, SUFFIX, words] of packed suffixes [B, SUFFIX] after the patches of one or more images."""
        embed = self.language.embed_tokens
        start = embed(torch.full((len(suffix), 1), ID["<bos>"]))
        hidden = torch.cat([start, patches, embed(suffix)], 1)
        prefix = hidden.shape[1] - SUFFIX
        cos, sin, mask = self._plan(prefix)
        for layer in self.language.layers[:-1]:
            hidden = self.text_block(layer, hidden, cos, sin, mask, 0)
        hidden = self.text_block(self.language.layers[-1], hidden, cos, sin, mask, prefix)
        return self.language.norm(hidden) @ embed.weight.T


def patch_logits(runner: Runner, patches: Tensor, words: list[int]) -> Tensor:
    """The patches against the language model's own embeddings of some words."""
    return patches @ runner.language.embed_tokens.weight[words].T
