"""A random model with the shape of Qwen2.5-VL, a processor with a word for each id, and prompts."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

HEAD_SIZE, TOWER_HEAD_SIZE = 128, 80
VISUAL_SHARE = 0.8
VOCABULARY = 512
MERGE = 2
PATCH_VALUES = 3 * 2 * 14 * 14
PATCH = 14
_START, _END, _IMAGE, _VIDEO, _EOS = range(VOCABULARY - 5, VOCABULARY)
_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_end|>")
_FRAME = "system You are a helpful assistant. user assistant"
_TEMPLATE = (
    "<|im_start|> system You are a helpful assistant. <|im_end|> "
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


class Shape(NamedTuple):
    """Size of a model; `group` query heads share a key head, and the head size is that of the 7B.

    The default vision tower is tiny, so that costs are those of the language model. The feed-forward layers have the
    width `inner`, or 11/4 of the hidden size where it is 0.
    """

    layers: int
    hidden: int
    dtype: str
    tower_layers: int = 1
    tower_hidden: int = 64
    group: int = 4
    inner: int = 0

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_SIZE

    @property
    def key_heads(self) -> int:
        return max(1, self.heads // self.group)


def random_model(shape: Shape, attention: str, seed: int = 0, device: str = "cpu") -> nn.Module:
    """Weights that keep activations near 1, attention peaked and greedy answers varied."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner or 11 * shape.hidden // 4,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 65536,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": _EOS,
        "pad_token_id": 0,
    }
    # As in Qwen2.5-VL: windows, and every eighth layer over the whole image.
    vision = {
        "depth": shape.tower_layers,
        "hidden_size": shape.tower_hidden,
        "intermediate_size": 8 * shape.tower_hidden // 3,
        "num_heads": max(1, shape.tower_hidden // TOWER_HEAD_SIZE),
        "out_hidden_size": shape.hidden,
        "fullatt_block_indexes": list(range(7, shape.tower_layers, 8)),
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
    )
    return fill(Qwen2_5_VLForConditionalGeneration, config, shape.dtype, attention, "visual.blocks", seed, device)


def fill(
    kind: Any, config: Any, dtype: str, attention: str, tower: str, seed: int = 0, device: str = "cpu"
) -> nn.Module:
    """A model of a class with random weights, whose answers never end early; `tower` is in the names of its vision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model: Any = kind._from_config(config, attn_implementation=attention).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            scale = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
            if tower in name:
                # A deep tower of random weights would make all patches alike.
                scale /= 2
            parameter.normal_(std=1.5 * scale if ".q_proj" in name or ".k_proj" in name else scale, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def twin(model: Any) -> Any:
    """Modules and a config of its own around the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def prompt(length: int, dtype: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `length` tokens, four fifths of them visual: a text, an image of noise, a text."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, int((VISUAL_SHARE * length) ** 0.5))
    columns = int(VISUAL_SHARE * length) // rows
    visual = rows * columns
    before = (length - visual) // 2
    text = torch.randint(1, _START, (length - visual - 2,), generator=generator)
    image = torch.full((visual + 2,), _IMAGE)
    image[0], image[-1] = _START, _END
    ids = torch.cat([text[:before], image, text[before:]])[None]
    patches = torch.randn(visual * MERGE**2, PATCH_VALUES, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == _IMAGE).int(),
        "pixel_values": patches.to(getattr(torch, dtype)),
        "image_grid_thw": torch.tensor([[1, MERGE * rows, MERGE * columns]]),
    }


def processor(texts: list[str]) -> Any:
    """Qwen2.5-VL's image processor, and a tokenizer with a word for each id, those of the texts first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImageProcessor(Qwen2_5_VLProcessor):
        """Without the part for videos, which needs torchvision."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    special = ["<pad>", "<|im_start|>"]
    texts_words = sorted({word for text in (*texts, _FRAME) for word in text.split()})
    words = [*special, *texts_words, *(f"word{number}" for number in range(VOCABULARY))][:_START]
    vocabulary = {word: number for number, word in enumerate([*words, *_MARKS])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token=_MARKS[-1], extra_special_tokens=[special[1], *_MARKS[:-1]]
    )
    # Never resize: benchmarks choose the number of pixels themselves.
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": (MERGE * PATCH) ** 2, "longest_edge": 2**31})
    return ImageProcessor(images, tokenizer, None, chat_template=_TEMPLATE)


def noise(side: int, seed: int = 0) -> Image.Image:
    """A square image of noise in 8 x 8 blocks."""
    blocks = torch.randint(0, 256, (side // 8, side // 8, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(blocks.byte().numpy()).resize((side, side), Image.Resampling.NEAREST)
