"""The processors by name, and what they are made of: a tokenizer whose special tokens have the ids of the zoo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import transformers

from tests.support.zoo.kinds import Kind, build, kinds

FILES = ("single", "tiles", "videos", "others")
CORPUS = (
    "USER: what digit is red ASSISTANT: seven",
    "Write a general description of the image.",
    "Answer the question using a single word or phrase.",
    "system user assistant You are a helpful assistant. what is the colour of the square at the left",
)
# The first id of the zoo's special tokens: image, video, start, end, break.
FIRST = 300
SQUARE = {"height": 56, "width": 56}
CROP: dict[str, Any] = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}
TEMPLATE = (
    "{{% for message in messages %}}{{{{ message['role'] | upper }}}}: {{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}} {{% endfor %}}"
    "{{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}"
)


class Pair(NamedTuple):
    """A processor, the kind of the zoo whose model it fits, and how to adapt the model, if it must be."""

    name: str
    kind: str
    make: Callable[[], Any]


_PAIRS: dict[str, Pair] = {}


def processor(kind: str | None = None) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Add a function that returns a processor, under its name; `kind` is the zoo's if that has another name."""

    def add(make: Callable[[], Any]) -> Callable[[], Any]:
        if make.__name__ in _PAIRS:
            raise ValueError(f"expected one processor of the name {make.__name__}, got two")
        _PAIRS[make.__name__] = Pair(make.__name__, kind or make.__name__, make)
        return make

    return add


def pairs() -> dict[str, Pair]:
    """All processors by name, including those whose classes the installed version lacks."""
    for file in FILES:
        import_module(f"tests.support.processors.{file}")
    return _PAIRS


def zoo_kind(name: str) -> Kind:
    """The kind of the zoo that a processor fits."""
    return kinds()[pairs()[name].kind]


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    """A model of the zoo and its processor, which the tests of a process share; they must leave them as they were.

    A test is skipped if the installed version lacks the model's class.
    """
    found = pairs()[name]
    if not zoo_kind(name).exists():
        pytest.skip(f"transformers {transformers.__version__} has no {zoo_kind(name).class_name}")
    return build(found.kind)[0], found.make()


def template(image: str, video: str = "") -> str:
    """A chat template that puts these texts where an image or a video is."""
    return TEMPLATE.format(image=image, video=video)


def tokenizer(special: Sequence[str], names: dict[str, str] | None = None, bos: bool = True) -> Any:
    """A tokenizer of 300 byte pairs, after which the special tokens have the ids FIRST, FIRST + 1, ...

    `names` are attributes such as `image_token` and the special token of each.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FIRST,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    more: dict[str, Any] = {} if names is None else {"extra_special_tokens": names}
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **more
    )
    if found.convert_tokens_to_ids(special[0]) != FIRST:
        raise ValueError(f"expected the id {FIRST} for {special[0]}, got {found.convert_tokens_to_ids(special[0])}")
    return found


def image_processor(model: str, name: str) -> Any:
    """The image processor class of a model folder: the one on Pillow, if there is one."""
    for module, suffix in ((f"image_processing_pil_{model}", "Pil"), (f"image_processing_{model}", "")):
        try:
            return getattr(import_module(f"transformers.models.{model}.{module}"), name + suffix)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"transformers {transformers.__version__} has no {name}")
