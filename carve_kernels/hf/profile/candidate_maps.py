"""One look at one picture gives the maps of every layer and of every choice of rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image

from carve_kernels.hf.decoding import sequential
from carve_kernels.hf.decoding.prefix_cache import Prefix
from carve_kernels.hf.decoding.support import obstacle
from carve_kernels.hf.decoding.tree_attention import Unshareable
from carve_kernels.hf.decoding.tree_decoder import Branch, Joint, Look, at_work
from carve_kernels.hf.engine.passes import needed
from carve_kernels.hf.engine.requests import Prompt, located
from carve_kernels.hf.image_features import Pictures, Shown
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.layouts.letterbox import Letterbox
from carve_kernels.hf.model import attention_modules, check_decoder, check_steady, input_device, unwrap
from carve_kernels.hf.profile.scores import Choice
from carve_kernels.hf.query_rows import RowsSpec, check_rows, general_rows, resolve_rows, tokenizer_of
from carve_kernels.hf.session import contract
from carve_kernels.maps import AttentionMaps
from carve_kernels.presets import Preset
from carve_kernels.types import View

_LOG = logging.getLogger("carve_kernels")
# Prompts of one picture in one row: beyond, the row's keys cost more than the forwards that they save.
TOGETHER = 16
# So many last words of the user's text are candidates one by one: what is asked for stands near the end.
LAST_WORDS = 4


class Seen(NamedTuple):
    """Maps [L, T, N] by rows, NaN where a layer has none, and the views that the tokens lie in."""

    maps: dict[RowsSpec, torch.Tensor]
    views: tuple[View, ...]


class _Asked(NamedTuple):
    """A prompt; the columns of each candidate's rows, the first of all, and how many last rows hold them."""

    prompt: Prompt
    shown: Shown
    columns: dict[RowsSpec, torch.Tensor]
    first: int
    rows: int


class RowReader:
    """Looks at a picture for several texts, with all layers and all candidate rows captured in the same forwards."""

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
        contract.ensure()
        check_decoder(model)
        check_steady(model)
        self._letterbox = letterbox
        self._model, self._processor, self._preset, self._backend = model, processor, preset, backend
        # Candidates of ours that a prompt does not have are left out; those of a caller are an error.
        self._given = rows is not None
        # What a preset cannot say cannot be picked.
        candidates = [
            check_rows(row, tokenizer_of(processor)) for row in (self._candidates() if rows is None else rows)
        ]
        self.rows: list[RowsSpec] = [replace(preset, rows=row).rows for row in candidates]  # type: ignore[arg-type]
        self.layers = tuple(sorted(attention_modules(model)))
        self.choices = [Choice(row, step) for row in self.rows for step in steps if step == "t_start" or row == "last"]
        if not self.choices:
            raise ValueError(f"rows: expected 'last' beside steps {list(steps)}, got {self.rows}")
        # Without words no head of the model runs; all layers are captured and none is saved.
        self._words = preset.max_new_tokens if set(steps) != {"t_start"} else 0
        self._joint: Joint | None = None

    def looks(self, image: Image.Image, general: str, texts: Sequence[str]) -> Iterator[Seen]:
        """The maps of the general instruction, and then of each text; in the former the whole stands for a word."""
        pictures = Pictures(self._processor, input_device(self._model), self._preset.max_pixels, self._letterbox)
        prefixes: dict[Any, Prefix | None] = {}
        # Asked for each picture: hooks come and go.
        reason = obstacle(self._model)
        self._joint = None if reason else Joint(unwrap(self._model), self._processor, self.layers, self._backend)
        if reason:
            _LOG.info("prompts are looked at one by one, since %s", reason)
        for start in range(0, 1 + len(texts), TOGETHER):
            asked = []
            for place, text in list(enumerate([general, *texts]))[start : start + TOGETHER]:
                said = build_prompt(self._processor, text + self._preset.suffix)
                inputs, shown = pictures.inputs([image], said)
                prompt = located(self._model, self._processor, image, said, inputs, shown.entries, self._letterbox)
                columns = self._columns(inputs["input_ids"].cpu(), prompt.layout.tokens(), general=place == 0)
                first = min(int(group.min()) for group in columns.values())
                asked.append(_Asked(prompt, shown, columns, first, inputs["input_ids"].shape[1] - first))
            for each, outcome in zip(asked, self._outcomes(asked, prefixes), strict=True):
                yield _seen(each, outcome)

    def _outcomes(self, asked: list[_Asked], prefixes: dict[Any, Prefix | None]) -> list[AttentionMaps]:
        """The maps of several prompts of one picture; `prefixes` has what was read of it, by its tokens."""
        if self._joint is not None:
            try:
                return self._together(self._joint, asked, prefixes)
            except Unshareable as reason:
                self._joint = None
                _LOG.info("prompts are looked at one by one, since %s", reason)
        return [
            needed(
                sequential.look(
                    self._model,
                    self._processor,
                    {**each.prompt.inputs, **each.shown.entries},
                    max(1, self._words),
                    layers=self.layers,
                    rows=each.rows,
                    layout=each.prompt.layout,
                    backend=self._backend,
                ).maps
            )
            for each in asked
        ]

    def _together(self, joint: Joint, asked: list[_Asked], prefixes: dict[Any, Prefix | None]) -> list[AttentionMaps]:
        looks: dict[Any, Look] = {}
        places = []
        for each in asked:
            ids = each.prompt.ids
            fresh = Look([], each.prompt.head, each.shown, each.prompt.layout, prefixes.get(ids))
            look = looks.setdefault(ids, fresh)
            look.branches = [*look.branches, Branch(each.prompt.inputs, self._words, each.rows)]
            places.append((ids, len(look.branches) - 1))
        with at_work(self._model):
            outcomes = dict(zip(looks, joint.run(list(looks.values())), strict=True))
        prefixes.update({ids: look.prefix for ids, look in looks.items()})
        return [needed(outcomes[ids][place].maps) for ids, place in places]

    def _columns(self, ids: torch.Tensor, tokens: torch.Tensor, general: bool) -> dict[RowsSpec, torch.Tensor]:
        """The columns of each candidate's rows; only rows behind the picture see it."""
        attended, after = torch.ones_like(ids, dtype=torch.bool), int(tokens.max())
        found: dict[RowsSpec, torch.Tensor] = {}
        for rows in self.rows:
            meant = general_rows(rows) if general else rows
            try:
                group = resolve_rows(meant, ids, attended, tokens, self._processor).columns[0]
                if int(group.min()) <= after:
                    raise ValueError(
                        f"rows: expected rows behind the picture, got {rows!r} in a prompt of {ids.numel()}"
                    )
            except ValueError:
                if self._given:
                    raise
                continue
            found[rows] = group
        if not found:
            raise ValueError(f"rows: expected rows behind the picture, the prompt has none of {self.rows}")
        return found

    def _candidates(self) -> list[RowsSpec]:
        """The last words of a text are counted from the end of a prompt; left out where the text's end is not found."""
        image, text, suffix = Image.new("RGB", (64, 64)), self._preset.general_prompt, self._preset.suffix
        said = build_prompt(self._processor, text + suffix)
        inputs = prepare(self._processor, [image], said)
        tokens = located(self._model, self._processor, image, said, inputs, {}).layout.tokens()
        ids = inputs["input_ids"]
        rows: RowsSpec = ("text", text) if suffix.strip() else "question"
        try:
            found = resolve_rows(rows, ids, torch.ones_like(ids) > 0, tokens, self._processor)
        except ValueError:
            return ["last", "question"]
        last = int(found.columns.max()) - ids.shape[1]
        return ["last", "question", *((place,) for place in range(last, last - LAST_WORDS, -1) if place < -1)]


def _seen(asked: _Asked, maps: AttentionMaps) -> Seen:
    values = maps.values[0].masked_fill(~maps.valid[0, ..., None], torch.nan).cpu()
    end = maps.last_step(0) + 1
    found = {
        rows: values[:, :end, -1] if rows == "last" else values[:, :1, group - asked.first].mean(2)
        for rows, group in asked.columns.items()
    }
    return Seen(found, asked.prompt.layout.views[0])
