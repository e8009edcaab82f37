"""Questions to an exported model in batches, with the attention of the rows that CARVE uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import GRID
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from carve_kernels.models.scenes import GENERAL, SIZE, Box

CHUNK = 50


@dataclass
class Answers:
    """Texts [n], and maps [n, L, 2, N]: step 0 is the prompt's last row, 1 the last answer word's."""

    texts: list[str]
    maps: Tensor

    @property
    def words(self) -> list[str]:
        """The first word of each answer."""
        return [text.partition(" ")[0] for text in self.texts]


class Reader:
    """An exported model in float32 with eager attention, the definition of the maps."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def _inputs(self, images: list[Image.Image], texts: list[str]) -> dict[str, Tensor]:
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
        prompts = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return dict(self.processor(images=images, text=prompts, return_tensors="pt"))

    @torch.no_grad()
    def answer(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        """The first word of each answer."""
        words: list[str] = []
        for at in range(0, len(images), CHUNK):
            inputs = self._inputs(images[at : at + CHUNK], questions[at : at + CHUNK])
            best = self.model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
            words += self.processor.batch_decode(best[:, None])
        return words

    @torch.no_grad()
    def _rows(self, inputs: dict[str, Tensor], limit: int) -> tuple[Tensor, Tensor]:
        """Generated words [n, T] and the maps [n, L, 2, N] of the prompt's last row and the last row before the end."""
        prompt = inputs["input_ids"].shape[1]
        sequence = self.model.generate(**inputs, max_new_tokens=limit)
        ended = (sequence[:, prompt:] == self.model.generation_config.eos_token_id).long()
        length = torch.where(ended.any(1), ended.argmax(1), ended.shape[1] - 1)
        inputs |= {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
        attention = self.model(**inputs, output_attentions=True).attentions
        tokens = sequence[0, :prompt] == self.model.config.image_token_id
        rows = torch.stack([torch.full_like(length, prompt - 1), prompt + length - 1], 1)
        batch = torch.arange(len(rows))[:, None]
        picked = [layer.mean(1)[batch, rows][..., :prompt][..., tokens] for layer in attention]
        return sequence[:, prompt:], torch.stack(picked, 1)

    def answer_with_maps(self, images: list[Image.Image], questions: list[str] | None, limit: int) -> Answers:
        """Answers with maps; without questions, those to the general prompt."""
        texts = questions or [GENERAL] * len(images)
        decoded, maps = [], []
        for at in range(0, len(images), CHUNK):
            answers, chunk = self._rows(self._inputs(images[at : at + CHUNK], texts[at : at + CHUNK]), limit)
            decoded += self.processor.batch_decode(answers, skip_special_tokens=True)
            maps.append(chunk)
        return Answers(decoded, torch.cat(maps))


def box_tokens(box: Box) -> np.ndarray:
    """The tokens [GRID * GRID] of a box: cells that it covers by a quarter, or that contain a quarter of it."""
    cell = SIZE / GRID
    low = np.arange(GRID) * cell
    wide = np.clip(np.minimum(low + cell, box[2]) - np.maximum(low, box[0]), 0, None)
    high = np.clip(np.minimum(low + cell, box[3]) - np.maximum(low, box[1]), 0, None)
    area = high[:, None] * wide
    return (area >= 0.25 * min(cell * cell, (box[2] - box[0]) * (box[3] - box[1]))).ravel()
