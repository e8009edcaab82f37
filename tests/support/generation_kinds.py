"""Tokenizers of every kind, trained on a few lines, and prompts with an image as processors build them."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.tiny_models import CORPUS, LLAVA_TEMPLATE, QWEN_TEMPLATE

IMAGE = "<image>"
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE, "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
LINES = [
    *CORPUS,
    "what's it, where's the cat, so it is.",
    "the traffic light is red. ASSISTANT: what color is the cat [INST] [/INST] café un café model user turn",
]
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}[/INST]"
    "{% else %} {{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = {
    "llava": LLAVA_TEMPLATE,
    "qwen": QWEN_TEMPLATE.replace("<|image_pad|>", IMAGE),
    "inst": INST,
    # Turns without a space around the texts, so that a token may be part of both.
    "glued": LLAVA_TEMPLATE.replace("<image>\n", IMAGE).replace(
        "{% endfor %} {% endfor %}", "{% endfor %}{% endfor %}"
    ),
}


def _train(model: Any, trainer: Any, normalizer: Any, pre: Any, decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre, decoder
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _byte_level() -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _train(models.BPE(), trainer, None, pre, decoders.ByteLevel())


def _bytes_of(vocabulary: int) -> dict[str, int]:
    return {f"<0x{byte:02X}>": vocabulary + byte for byte in range(256)}


def _llama() -> Tokenizer:
    """As Llama's: a space before the text, merges across words, bytes for unknown characters."""
    normal = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer = _train(models.BPE(), trainer, normal, None, None)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    vocabulary = {**state["vocab"], **_bytes_of(len(state["vocab"]))}
    tokenizer.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _unigram(scheme: str, fallback: bool = True) -> Tokenizer:
    """As T5's and Gemma's: a mark for a space before a piece, bytes or a token for unknown characters, NFKC."""
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    pre = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = _train(models.Unigram(), trainer, normalizers.NFKC(), pre, None)
    pieces = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces += [(piece, -20.0) for piece in _bytes_of(0) if fallback]
    tokenizer.model = models.Unigram(
        pieces, unk_id=[piece for piece, _ in pieces].index("<unk>"), byte_fallback=fallback
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return tokenizer


def _word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(SPECIAL), show_progress=False)
    return _train(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )


KINDS = {
    "byte-level": _byte_level,
    "llama": _llama,
    "first": functools.partial(_unigram, "first"),
    "always": functools.partial(_unigram, "always"),
    "word-piece": _word_piece,
}
# A kind without line breaks, so that most templates contain unknown tokens.
NO_BREAKS = "no-breaks"


@functools.cache
def tokenizer_of_kind(kind: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_unigram("first", fallback=False) if kind == NO_BREAKS else KINDS[kind](),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=[IMAGE, *SPECIAL[5:]],
    )


def processor_of_kind(kind: str, template: str | None) -> Any:
    """What is needed of a processor besides its tokenizer: the chat template and the image token."""
    tokenizer = tokenizer_of_kind(kind)
    chat_template = TEMPLATES.get(template or "", template)
    return SimpleNamespace(
        tokenizer=tokenizer,
        chat_template=chat_template,
        image_token=IMAGE,
        apply_chat_template=functools.partial(tokenizer.apply_chat_template, chat_template=chat_template),
    )


def user(text: str, images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


class Prompted:
    """A prompt with `width` tokens per image: its ids, its visual columns, and the columns of its characters."""

    def __init__(self, tokenizer: Any, text: str, width: int = 4) -> None:
        self.text = text.replace(IMAGE, IMAGE * width)
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        self.ids = torch.tensor([encoded["input_ids"]])
        self.offsets = encoded["offset_mapping"]
        self.tokens = (self.ids == tokenizer.convert_tokens_to_ids(IMAGE)).nonzero()[:, 1].int()[None]
        self.attended = torch.ones_like(self.ids, dtype=torch.bool)

    def columns(self, start: int, stop: int) -> list[int]:
        """The columns that contain one of the characters, by the tokenizer's offsets."""
        return [column for column, (first, end) in enumerate(self.offsets) if max(first, start) < min(end, stop)]
