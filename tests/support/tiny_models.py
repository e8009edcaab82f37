"""Tiny random models with real processors, built in memory in a second."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

HIDDEN = 128
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CORPUS = [
    "USER: what digit is red ASSISTANT: seven",
    "Write a general description of the image.",
    "Answer the question using a single word or phrase.",
    "system user assistant You are a helpful assistant. what is the colour of the square at the left",
]
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fix_torchvision() -> torch.library.Library | None:
    """Define two schemas that torchvision's wheel lacks with a CPU build of torch; keep the result alive.

    transformers imports torchvision if it is installed, so this must run before its first use.
    """
    if find_spec("torchvision") is None:
        return None
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return library
    return None


SCHEMAS = fix_torchvision()


def tiny_llava(
    seed: int = 0, strategy: str = "default", language: dict[str, Any] | None = None, **image_settings: Any
) -> tuple[Any, Any]:
    """A LLaVA-1.5 with a 6 x 6 grid; `image_settings` go to its CLIP image processor, `language` to its text model."""
    from transformers import (
        CONFIG_MAPPING,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer(pad="<pad>", bos="<s>", eos="</s>", others=("<image>",))
    settings = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}, **image_settings}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**settings),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=84, patch_size=14
    )
    settings = {"model_type": "llama", **TEXT, **_special_ids(tokenizer), **(language or {})}
    text = CONFIG_MAPPING[settings.pop("model_type")](**settings, vocab_size=len(tokenizer))
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36,
        vision_feature_select_strategy=strategy,
    )
    return _finish(LlavaForConditionalGeneration, config, tokenizer, seed), processor


def tiny_qwen2_vl(seed: int = 0) -> tuple[Any, Any]:
    """A Qwen2-VL with patches of 14 pixels, merged 2 by 2."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision, seed)


def tiny_qwen2_5_vl(seed: int = 0) -> tuple[Any, Any]:
    """A Qwen2.5-VL with patches of 14 pixels, merged 2 by 2, and windows of 4 x 4 patches in its first block."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, vision, seed)


def tiny_llama(seed: int = 0) -> Any:
    """A text-only model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(pad="<pad>", bos="<s>", eos="</s>", others=())
    config = LlamaConfig(**TEXT, **_special_ids(tokenizer), vocab_size=len(tokenizer))
    return _finish(LlamaForCausalLM, config, tokenizer, seed)


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise in 8 x 8 blocks, so that no two regions are alike at any resolution."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (max(1, height // 8), max(1, width // 8), 3), generator=generator).byte()
    return Image.fromarray(blocks.numpy()).resize((width, height), Image.Resampling.NEAREST)


def prompts_for(processor: Any, texts: list[str], images: list[int] | None = None) -> list[str]:
    """Chat prompts, one a row, with one image each or as many as `images` says."""
    counts = images or [1] * len(texts)
    chats = [
        [{"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": text}]}]
        for text, count in zip(texts, counts, strict=True)
    ]
    return [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]


def inputs_for(processor: Any, images: list[Any], texts: list[str], padding_side: str = "left") -> Any:
    """Model inputs for rows of one image (or a list of images) and one text each, padded on `padding_side`."""
    rows = [row if isinstance(row, list) else [row] for row in images]
    prompts = prompts_for(processor, texts, [len(row) for row in rows])
    flat = [image for row in rows for image in row]
    return processor(images=flat, text=prompts, return_tensors="pt", padding=True, padding_side=padding_side)


def save(model: Any, processor: Any, directory: str | Path) -> Path:
    """Write a checkpoint directory: safetensors and the files of the processor."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)


def _qwen(config_class: Any, model_class: Any, processor_class: Any, vision: dict[str, Any], seed: int) -> Any:
    from transformers import Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(pad="<|endoftext|>", bos=None, eos="<|im_end|>", others=marks)
    processor = processor_class(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = {**TEXT, **_special_ids(tokenizer), "rope_parameters": rope, "vocab_size": len(tokenizer)}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark)
        for name, mark in zip(("vision_start", "vision_end", "image", "video"), marks[1:], strict=True)
    }
    config = config_class(text_config=text, vision_config=vision, **ids)
    return _finish(model_class, config, tokenizer, seed), processor


def _tokenizer(pad: str, bos: str | None, eos: str, others: tuple[str, ...]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [mark for mark in (pad, bos, eos, *others) if mark]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, extra_special_tokens=list(others)
    )


def _special_ids(tokenizer: Any) -> dict[str, Any]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def _finish(model_class: Any, config: Any, tokenizer: Any, seed: int) -> Any:
    """Weights of a size that keeps activations near 1, attention peaked and greedy answers varied."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            scale = parameter[0].numel() ** -0.5
            if "embed_tokens" in name:
                scale = 1.0
            elif ".q_proj" in name or ".k_proj" in name:
                scale *= 1.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
