"""Prompts about the image of a zoo model, as groups for decoding, and each of them decoded by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from carve_kernels import AttentionMaps, View, VisualLayout, capture_attention
from carve_kernels.hf.decoding.generation import preserved_positions
from carve_kernels.hf.decoding.prompt_groups import Branch, PromptGroup
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.decoding.tree_decoder import TreeDecoder
from carve_kernels.hf.image_inputs import ImageFeatures
from carve_kernels.hf.model import decoder_layers
from tests.support.families import watched

# What follows the image in each prompt.
QUESTIONS = ((40, 41, 42, 43, 44), (40, 41, 50), (60, 61, 62, 63, 64, 65, 66, 67, 68))
TYPES = ("token_type_ids", "mm_token_type_ids")


def asking(inputs: dict[str, torch.Tensor], columns: list[int], question: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The inputs of a prompt whose text after the image is `question`."""
    end = columns[-1] + 2
    asked = dict(inputs)
    for name in ("input_ids", "attention_mask", *TYPES):
        if name in inputs:
            rest = {"input_ids": torch.tensor([question]), "attention_mask": torch.ones(1, len(question))}.get(name)
            rest = torch.zeros(1, len(question)) if rest is None else rest
            asked[name] = torch.cat([inputs[name][:, :end], rest.to(inputs[name].dtype)], 1)
    return asked


def layout_at(columns: list[int]) -> VisualLayout:
    view = View(torch.tensor(columns), (1, len(columns)), (0.0, 0.0, 9.0, 9.0))
    return VisualLayout(((view,),), (((9, 9),),))


def group_of(
    inputs: dict[str, torch.Tensor], columns: list[int], count: int, rows: Any = "last", start: int | None = None
) -> PromptGroup:
    """The questions about an image, each with `count` new tokens."""
    text = {name: value for name, value in inputs.items() if not name.startswith(("pixel", "image_pixel"))}
    is_text = ("input_ids", "attention_mask", *TYPES)
    pixels = {name: value for name, value in inputs.items() if name not in is_text}
    group = PromptGroup(ImageFeatures(lambda: pixels), columns[-1] + 1 if start is None else start, layout_at(columns))
    group.branches += [Branch(asking(text, columns, question), count, rows) for question in QUESTIONS]
    return group


def decode(model: Any, layers: tuple[int, ...], *groups: PromptGroup) -> list[Any]:
    with torch.no_grad(), preserved_positions(model):
        return TreeDecoder(model, None, layers, "auto").decode(groups)


def alone(
    model: Any,
    inputs: dict[str, torch.Tensor],
    columns: list[int],
    question: tuple[int, ...],
    count: int,
    layers: tuple[int, ...],
) -> tuple[list[int], AttentionMaps]:
    """The answer of `generate` in a session."""
    asked = asking(inputs, columns, question)
    with capture_attention(model, layers=layers, tokens=layout_at(columns)) as session:
        ids = greedy_generate(model, asked, count)
        return ids.tolist(), session.maps


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """How many tokens each layer has processed."""
    counts = [0] * len(decoder_layers(model))

    def count(number: int) -> Any:
        def add(args: Any, _kwargs: Any) -> None:
            counts[number] += args[0].shape[1]

        return add

    with ExitStack() as stack:
        for number, each in enumerate(decoder_layers(model)):
            stack.enter_context(watched(each, before=count(number)))
        yield counts
