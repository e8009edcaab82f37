"""The untrained model, its tokenizer and its processor."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from carve_kernels.models.scenes import COLOURS, DIGITS

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
# "nothing" is the class of background patches.
WORDS = (*SPECIAL, "nothing", "what", "digit", "is", "describe", "the", "image", *DIGITS, *COLOURS)
ID = {word: number for number, word in enumerate(WORDS)}
IMAGE, PATCH, WIDTH, HEADS = 96, 8, 128, 4
GRID = IMAGE // PATCH
TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <image>' }}"
    "{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' <eos>' }}{% endif %}"
    "{% endfor %}"
)


def _positions() -> torch.Tensor:
    """Two-dimensional sin-cos positions [1 + GRID * GRID, WIDTH]; the class token has none."""
    waves = 1.5 * 30.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    angle = torch.arange(GRID)[:, None] * waves
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows = line[:, None].expand(GRID, GRID, -1)
    columns = line[None].expand(GRID, GRID, -1)
    grid = torch.cat([rows, columns], -1).reshape(GRID * GRID, WIDTH)
    return torch.cat([torch.zeros(1, WIDTH), grid])


@torch.no_grad()
def _initialise(model: LlavaForConditionalGeneration) -> None:
    """Unit-scale weights; keys start as queries, so that equal content and near positions attend to each other."""
    unit = WIDTH**-0.5
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "position_embedding" in name:
            continue
        ends_a_branch = name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"))
        weight.normal_(std=unit / math.sqrt(8) if ends_a_branch else unit)
    tower = model.model.vision_tower
    for layer in [*tower.encoder.layers, *model.model.language_model.layers]:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    tower.embeddings.position_embedding.weight.copy_(_positions())


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """A fresh float32 model of about 1.75 M parameters."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=HEADS,
        image_size=IMAGE, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=5,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=ID["<pad>"], bos_token_id=ID["<bos>"], eos_token_id=ID["<eos>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=ID["<image>"], image_seq_length=GRID * GRID,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _initialise(model)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=20,
        pad_token_id=ID["<pad>"], bos_token_id=ID["<bos>"], eos_token_id=ID["<eos>"],
    )  # fmt: skip
    return model


def build_processor() -> LlavaProcessor:
    """A word-level tokenizer that ignores case and punctuation, and CLIP's image processor on Pillow."""
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z ]"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left", model_max_length=1024,
    )  # fmt: skip
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model as fp16 safetensors, with its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    build_processor().save_pretrained(folder)
