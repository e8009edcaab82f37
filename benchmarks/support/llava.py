"""A random model with the shape of LLaVA-1.5, and its processor with a word for each id.

The ids, the tokens of an image and the size of its pixels are those of LLaVA-1.5, which ViCrop's program and the
release's take for granted.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.support.models import HEAD_SIZE, Shape, fill

SIDE, PATCH, IMAGE_TOKEN = 336, 14, 32000
TOKENS = (SIDE // PATCH) ** 2
_TOWER_HEAD_SIZE = 64


def random_llava(shape: Shape, attention: str, seed: int = 0) -> nn.Module:
    """Weights that keep activations near 1, attention peaked and greedy answers varied."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner or 11 * shape.hidden // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // shape.group),
        head_dim=HEAD_SIZE,
        vocab_size=IMAGE_TOKEN + 1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_hidden,
        intermediate_size=4 * shape.tower_hidden,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=max(1, shape.tower_hidden // _TOWER_HEAD_SIZE),
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=TOKENS,
        vision_feature_layer=-2 if shape.tower_layers > 1 else -1,
    )  # fmt: skip
    return fill(LlavaForConditionalGeneration, config, shape.dtype, attention, "vision_tower", seed)


def processor(texts: list[str]) -> Any:
    """CLIP's image processor, and a tokenizer with a word for each id, those of the texts first."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<pad>", "</s>"]
    of_texts = sorted({word for text in (*texts, "USER: ASSISTANT:") for word in text.split()})
    words = [*special, *of_texts, *(f"word{number}" for number in range(IMAGE_TOKEN))][:IMAGE_TOKEN]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
