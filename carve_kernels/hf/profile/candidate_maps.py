"""The maps of every layer and of every candidate choice of rows, from one prefill of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image

from carve_kernels.hf.decoding import Branch, Decoder, PrefixCache, PromptGroup
from carve_kernels.hf.engine.requests import Prompt, locate_prompt
from carve_kernels.hf.image_inputs import ImageFeatures, ImageInputs
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.layouts.letterbox import Letterbox
from carve_kernels.hf.model import attention_modules
from carve_kernels.hf.profile.scores import Choice
from carve_kernels.hf.query_rows import check_rows, general_rows, resolve_rows, tokenizer_of
from carve_kernels.maps import AttentionMaps
from carve_kernels.presets import Preset
from carve_kernels.types import RowsSpec, View

# Prompts of one image in one batch: with more, their keys cost more than the forwards that they save.
MAX_BATCH = 16
# Each of the last tokens of the user's text is a candidate: the object of a question is usually near its end.
LAST_TOKENS = 4


class CandidateMaps(NamedTuple):
    """Maps [L, T, N] by rows, NaN where a layer has none, and the views of the tokens."""

    maps: dict[RowsSpec, torch.Tensor]
    views: tuple[View, ...]


class _CandidatePrompt(NamedTuple):
    """A prompt; the columns of each candidate's rows, the first of them, and how many last rows contain them all."""

    prompt: Prompt
    features: ImageFeatures
    columns: dict[RowsSpec, torch.Tensor]
    first: int
    rows: int


class CandidateReader:
    """Captures all layers and all candidate rows for several texts about an image in the same forwards."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        preset: Preset,
        rows: Sequence[RowsSpec] | None,
        steps: Sequence[str],
        backend: str,
        letterbox: Letterbox | None = None,
    ) -> None:
        self._letterbox = letterbox
        self._model, self._processor, self._preset, self._backend = model, processor, preset, backend
        # Default candidates that a prompt does not have are left out; those of a caller are an error.
        self._rows_are_given = rows is not None
        candidates = [
            check_rows(row, tokenizer_of(processor)) for row in (self._default_rows() if rows is None else rows)
        ]
        # As a preset has them, since the choice becomes one.
        self.rows: list[RowsSpec] = [replace(preset, rows=row).rows for row in candidates]  # type: ignore[arg-type]
        self.layers = tuple(sorted(attention_modules(model)))
        self.choices = [Choice(row, step) for row in self.rows for step in steps if step == "t_start" or row == "last"]
        if not self.choices:
            raise ValueError(f"rows: expected 'last' among the rows for steps {list(steps)}, got {self.rows}")
        # Without new tokens the head of the model does not run; all layers are captured, so none is saved.
        self._new_tokens = preset.max_new_tokens if set(steps) != {"t_start"} else 0

    def read(self, image: Image.Image, general: str, texts: Sequence[str]) -> Iterator[CandidateMaps]:
        """The maps of the general instruction, where the whole instruction replaces a word, then those of each text."""
        image_inputs = self._image_inputs()
        prefixes: dict[tuple[int, ...], PrefixCache | None] = {}
        # Created for each image: hooks may be added or removed between images.
        decoder = Decoder(self._model, self._processor, self.layers, self._backend)
        for start in range(0, 1 + len(texts), MAX_BATCH):
            candidates = []
            for index, text in list(enumerate([general, *texts]))[start : start + MAX_BATCH]:
                prompt_text = build_prompt(self._processor, text + self._preset.suffix)
                inputs, features = image_inputs.inputs([image], prompt_text)
                prompt = locate_prompt(
                    self._model, self._processor, [image], prompt_text, inputs, features, self._letterbox
                )
                columns = self._columns(inputs["input_ids"].cpu(), prompt.layout.tokens(), general=index == 0)
                first = min(int(group.min()) for group in columns.values())
                candidates.append(
                    _CandidatePrompt(prompt, features, columns, first, inputs["input_ids"].shape[1] - first)
                )
            yield from self._decode(decoder, candidates, prefixes)

    def _image_inputs(self) -> ImageInputs:
        prepare_image = None if self._letterbox is None else self._letterbox.pad
        return ImageInputs.for_model(self._model, self._processor, self._preset.max_pixels, prepare_image)

    def _decode(
        self, decoder: Decoder, candidates: list[_CandidatePrompt], prefixes: dict[tuple[int, ...], PrefixCache | None]
    ) -> list[CandidateMaps]:
        """The maps of several prompts about one image; `prefixes` has its prefix caches by their tokens."""
        groups: dict[tuple[int, ...], PromptGroup] = {}
        branches = []
        for candidate in candidates:
            prompt, ids = candidate.prompt, candidate.prompt.prefix_ids
            if ids not in groups:
                groups[ids] = PromptGroup(candidate.features, prompt.prefix_length, prompt.layout, prefixes.get(ids))
            branches.append(Branch(prompt.inputs, self._new_tokens, candidate.rows))
            groups[ids].branches.append(branches[-1])
        decoder.decode(list(groups.values()))
        prefixes.update({ids: group.prefix for ids, group in groups.items()})
        return [_select(candidate, branch.maps) for candidate, branch in zip(candidates, branches, strict=True)]

    def _columns(self, ids: torch.Tensor, tokens: torch.Tensor, general: bool) -> dict[RowsSpec, torch.Tensor]:
        """The columns of each candidate's rows; only rows after the image see it."""
        attended, last_visual = torch.ones_like(ids, dtype=torch.bool), int(tokens.max())
        columns: dict[RowsSpec, torch.Tensor] = {}
        for rows in self.rows:
            try:
                group = resolve_rows(
                    general_rows(rows) if general else rows, ids, attended, tokens, self._processor
                ).columns[0]
                if int(group.min()) <= last_visual:
                    raise ValueError(f"rows: expected rows after the image, got {rows!r} in a prompt of {ids.numel()}")
            except ValueError:
                if self._rows_are_given:
                    raise
                continue
            columns[rows] = group
        if not columns:
            raise ValueError(f"rows: expected rows after the image, the prompt has none of {self.rows}")
        return columns

    def _default_rows(self) -> list[RowsSpec]:
        """The last tokens of a text, counted from the end of a prompt, are left out if its end is not found."""
        image, text, suffix = Image.new("RGB", (64, 64)), self._preset.general_prompt, self._preset.suffix
        prompt = build_prompt(self._processor, text + suffix)
        inputs, features = ImageInputs(self._processor, torch.device("cpu"), None).inputs([image], prompt)
        tokens = locate_prompt(self._model, self._processor, [image], prompt, inputs, features).layout.tokens()
        ids = inputs["input_ids"]
        rows: RowsSpec = ("text", text) if suffix.strip() else "question"
        try:
            columns = resolve_rows(rows, ids, torch.ones_like(ids) > 0, tokens, self._processor).columns
        except ValueError:
            return ["last", "question"]
        last = int(columns.max()) - ids.shape[1]
        return ["last", "question", *((row,) for row in range(last, last - LAST_TOKENS, -1) if row < -1)]


def _select(candidate: _CandidatePrompt, maps: AttentionMaps) -> CandidateMaps:
    """The maps of each candidate among the captured last rows."""
    seen = maps.seen[0] | (maps.tokens[0] < 0)
    values = maps.values[0].masked_fill(~seen.all(-1, keepdim=True), torch.nan).cpu()
    end = maps.last_step(0) + 1
    by_rows = {
        rows: values[:, :end, -1] if rows == "last" else values[:, :1, group - candidate.first].mean(2)
        for rows, group in candidate.columns.items()
    }
    return CandidateMaps(by_rows, candidate.prompt.layout.views[0])
