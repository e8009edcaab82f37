"""The two looks of CARVE for any number of questions: at the originals, then at what was kept of them.

Together where the model allows it (joint.py), else one generation after the other (sequential.py); the answers and the maps
are the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from carve_kernels.hf.decoding import sequential
from carve_kernels.hf.decoding.support import obstacle
from carve_kernels.hf.decoding.tree_attention import Unshareable
from carve_kernels.hf.decoding.tree_decoder import Branch, Joint, Look, Outcome, at_work
from carve_kernels.hf.engine.cache import Memory
from carve_kernels.hf.engine.fingerprint import digest, fingerprint
from carve_kernels.hf.engine.requests import Final, Prompt, Request
from carve_kernels.hf.image_features import Shown
from carve_kernels.hf.model import image_token_positions, input_device, unwrap
from carve_kernels.hf.query_rows import RowsSpec, general_rows
from carve_kernels.hf.tensors import Unidentified
from carve_kernels.maps import AttentionMaps
from carve_kernels.presets import Preset

_LOG = logging.getLogger("carve_kernels")


@dataclass
class Seen:
    """What the first look found: the plain answer (None where nobody wants it), the maps, seconds of both prompts."""

    task: Outcome
    general: AttentionMaps
    seconds: dict[str, float]
    look: Look | None = None


class Looker:
    """Looks of one call of the engine: one thread, one model, requests that are answered together."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        preset: Preset,
        layers: tuple[int, ...],
        *,
        backend: str,
        memory: Memory | None,
        plain: bool,
        fit: str | None = None,
    ) -> None:
        self._model, self._processor, self._preset, self._layers = model, processor, preset, layers
        self._backend, self._memory = backend, memory
        lasting = preset.rows == "last" or isinstance(preset.rows, int)
        self._steps = 1 if preset.steps == "t_start" or not lasting else preset.max_new_tokens
        # What is read of the maps decides how many words must be found for them; an answer takes them all.
        self._general_words = 0 if self._steps == 1 else preset.max_new_tokens
        self._task_words = preset.max_new_tokens if plain else self._general_words
        self._plain, self._fit = plain, fit
        self._digests: dict[int, str] = {}
        self._identity = ""
        if memory is not None:
            try:
                self._identity = fingerprint(model, processor)
            except Unidentified as error:
                self._memory = None
                _LOG.info("nothing is remembered of this model, since %s", error)
        self._compare = self._memory is not None
        self._joint: Joint | None = None
        reason = obstacle(model)
        if reason is None:
            self._joint = Joint(unwrap(model), processor, layers, backend)
        else:
            self._one_by_one(reason)

    def first(self, requests: Sequence[Request]) -> list[Seen]:
        """Look at the originals: every question, and the general instruction once for each picture."""
        start = time.perf_counter()
        self._compare |= len(requests) > 1
        if self._joint is not None:
            try:
                return self._first_together(self._joint, requests, start)
            except Unshareable as reason:
                self._one_by_one(str(reason))
        return [self._first_apart(request) for request in requests]

    def second(self, requests: Sequence[Request], seen: Sequence[Seen], finals: Sequence[Final]) -> list[Outcome]:
        """Ask the last questions, behind what the first look has read of the originals where they show them again."""
        words = self._preset.max_new_tokens
        if self._memory is None:
            _let_go(requests, seen, finals)
        if self._joint is not None:
            try:
                return self._second_together(self._joint, requests, seen, finals)
            except Unshareable as reason:
                self._one_by_one(str(reason))
        shown = [
            request.entries if final.shown is request.shown else final.shown.entries
            for request, final in zip(requests, finals, strict=True)
        ]
        return [
            sequential.answer(self._model, self._processor, {**final.inputs, **entries}, words)
            for final, entries in zip(finals, shown, strict=True)
        ]

    def keep(self, seen: Sequence[Seen], requests: Sequence[Request]) -> None:
        """Hand what was read of the originals to the memory."""
        if self._memory is None:
            return
        looks = {id(each.look): (each.look, request) for each, request in zip(seen, requests, strict=True)}
        for look, request in looks.values():
            if look is not None and look.prefix is not None:
                with at_work(self._model):
                    look.prefix.trim()
                self._memory.keep_prefix(self._prefix_key(request, request.task), look.prefix, look.prefix.nbytes)

    def _first_together(self, joint: Joint, requests: Sequence[Request], start: float) -> list[Seen]:
        looks: dict[Any, Look] = {}
        places: list[tuple[Look, int]] = []
        generals: dict[str, tuple[Look, int] | AttentionMaps] = {}
        shown: dict[str, Shown] = {}
        for request in requests:
            picture = self._digest(request)
            shown.setdefault(picture, request.shown)
            places.append(self._branch(looks, request, request.task, self._task_words, self._preset.rows, shown))
            if picture not in generals:
                known = None if self._memory is None else self._memory.maps(self._maps_key(request))
                generals[picture] = known or self._branch(
                    looks, request, request.general, self._general_words, self.general_rows, shown
                )
        read = {id(look): look.prefix is None for look in looks.values()}
        with at_work(self._model):
            outcomes = dict(zip(map(id, looks.values()), joint.run(list(looks.values())), strict=True))
        if self._plain:
            for each in shown.values():
                each.forget()
        maps: dict[str, AttentionMaps] = {}
        for request in requests:
            picture, general = self._digest(request), generals[self._digest(request)]
            if picture in maps:
                continue
            if isinstance(general, AttentionMaps):
                maps[picture] = general
                continue
            look, place = general
            maps[picture] = needed(outcomes[id(look)][place].maps)
            if self._memory is not None:
                self._memory.keep_maps(self._maps_key(request), maps[picture])
        found = [
            Seen(outcomes[id(look)][place], maps[self._digest(request)], {}, look)
            for request, (look, place) in zip(requests, places, strict=True)
        ]
        self._share(requests, found, generals, outcomes, read, time.perf_counter() - start)
        return found

    def _share(
        self, requests: Sequence[Request], found: list[Seen], generals: Any, outcomes: Any, read: Any, seconds: float
    ) -> None:
        """Split the time of a joint look by the tokens that were forwarded for each prompt."""
        looks = [id(each.look) for each in found]
        pictures = [self._digest(request) for request in requests]
        weights = []
        for each, picture in zip(found, pictures, strict=True):
            prefix = len(each.look.prefix) if each.look and each.look.prefix and read[id(each.look)] else 0
            general = generals[picture]
            own = 0 if isinstance(general, AttentionMaps) else outcomes[id(general[0])][general[1]].tokens
            weights.append((each.task.tokens + prefix / looks.count(id(each.look)), own / pictures.count(picture)))
        total = sum(map(sum, weights))
        for each, (task, general) in zip(found, weights, strict=True):
            each.seconds = {"task": seconds * task / total, "general": seconds * general / total}

    def _branch(
        self,
        looks: dict[Any, Look],
        request: Request,
        prompt: Prompt,
        words: int,
        rows: RowsSpec,
        shown: dict[str, Shown],
    ) -> tuple[Look, int]:
        """Add a prompt to the look of those that begin like it."""
        picture = self._digest(request)
        key = (picture, prompt.ids)
        if key not in looks:
            prefix = None if self._memory is None else self._memory.prefix(self._prefix_key(request, prompt))
            # A picture that the last question shows again is read for it as well.
            whole = self._preset.images != "refined"
            looks[key] = Look([], prompt.head, shown[picture], prompt.layout, prefix, whole)
        look = looks[key]
        look.branches = [*look.branches, Branch(prompt.inputs, words, rows)]
        return look, len(look.branches) - 1

    def _second_together(
        self, joint: Joint, requests: Sequence[Request], seen: Sequence[Seen], finals: Sequence[Final]
    ) -> list[Outcome]:
        words = self._preset.max_new_tokens
        looks: dict[Any, Look] = {}
        places = []
        for number, (request, each, final) in enumerate(zip(requests, seen, finals, strict=True)):
            head, before = request.task.ids, each.look
            begins_alike = before is not None and tuple(final.inputs["input_ids"][0, : len(head)].tolist()) == head
            if before is not None and begins_alike and (final.shown is request.shown or final.last is not None):
                key: Any = id(before)
                branch = Branch(final.inputs, words, pictures=None if final.shown is request.shown else final.last)
                fresh = Look([], before.start, before.pictures, prefix=before.prefix)
            else:
                branch = Branch(final.inputs, words)
                columns = image_token_positions(unwrap(self._model), final.inputs["input_ids"])[0]
                start = int(columns[-1]) + 1
                fresh = Look([], start, final.shown)
                key = number
                if final.refined is not None and len(requests) > 1:
                    # Two questions may keep the same part of a picture.
                    beginning = tuple(final.inputs["input_ids"][0, :start].tolist())
                    key = (self._digest(request), digest(final.refined), beginning)
            look = looks.setdefault(key, fresh)
            look.branches = [*look.branches, branch]
            places.append((look, len(look.branches) - 1))
        with at_work(self._model):
            outcomes = dict(zip(map(id, looks.values()), joint.run(list(looks.values())), strict=True))
        return [outcomes[id(look)][place] for look, place in places]

    def _first_apart(self, request: Request) -> Seen:
        begun = time.perf_counter()
        task = self._apart(request, request.task, self._task_words, self._preset.rows)
        between = time.perf_counter()
        known = None if self._memory is None else self._memory.maps(self._maps_key(request))
        if known is None:
            known = needed(self._apart(request, request.general, self._general_words, self.general_rows).maps)
            if self._memory is not None:
                self._memory.keep_maps(self._maps_key(request), known)
        return Seen(task, known, {"task": between - begun, "general": time.perf_counter() - between})

    def _apart(self, request: Request, prompt: Prompt, words: int, rows: RowsSpec) -> Outcome:
        return sequential.look(
            self._model,
            self._processor,
            {**prompt.inputs, **request.entries},
            max(1, words),
            layers=self._layers,
            rows=rows,
            layout=prompt.layout,
            backend=self._backend,
        )

    @property
    def general_rows(self) -> RowsSpec:
        return general_rows(self._preset.rows)

    def _digest(self, request: Request) -> str:
        if not self._compare:
            return ""
        if id(request) not in self._digests:
            self._digests[id(request)] = digest(request.image)
        return self._digests[id(request)]

    def _maps_key(self, request: Request) -> tuple[Any, ...]:
        return (
            self._identity, self._digest(request), self._preset.max_pixels, self._fit, self._ids(request.general),
            self._layers, self.general_rows, self._steps, self._backend,
        )  # fmt: skip

    def _prefix_key(self, request: Request, prompt: Prompt) -> tuple[Any, ...]:
        device = str(input_device(self._model))
        return self._identity, device, self._digest(request), self._preset.max_pixels, self._fit, prompt.ids

    @staticmethod
    def _ids(prompt: Prompt) -> list[int]:
        found: list[int] = prompt.inputs["input_ids"][0].tolist()
        return found

    def _one_by_one(self, reason: str) -> None:
        self._joint = None
        _LOG.info("prompts are looked at one by one, since %s", reason)


def _let_go(requests: Sequence[Request], seen: Sequence[Seen], finals: Sequence[Final]) -> None:
    """Drop what was read of originals that no last question shows again: nobody keeps it, and its room is wanted."""
    shown = {
        id(each.look)
        for request, each, final in zip(requests, seen, finals, strict=True)
        if final.shown is request.shown or final.last is not None
    }
    for each in seen:
        if each.look is not None and id(each.look) not in shown:
            each.look.prefix = None


def needed(maps: AttentionMaps | None) -> AttentionMaps:
    """The maps of a prompt that was asked for them."""
    if maps is None:
        raise RuntimeError("maps: expected those of a captured prompt, got none")
    return maps
