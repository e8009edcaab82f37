"""Any order of forwards, caches and masks in one session: each map is eager's, or an error says why there is none."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carve_kernels import capture_attention
from tests.support.conversations import (
    CACHES,
    CAPACITY,
    KINDS,
    LAYERS,
    MASKS,
    PICTURE_TOKENS,
    WINDOW,
    Conversation,
    Prompt,
    gathered,
    mask_of,
    model_of,
    new_cache,
    prompt_of,
    truth_of,
)

OPERATIONS = (
    "prompt",
    "step",
    "turn",
    "share",
    "crop",
    "evict",
    "reorder",
    "fork",
    "repeat",
    "reset",
    "aside",
    "stop",
    "generate",
)
REFUSAL = re.compile(r"^[a-z_]+: ")


class Interrupted(Exception):
    """What a hook of the test raises."""


class World:
    """One session over a model, an eager twin as its oracle, and the conversations that go on in it."""

    def __init__(self, draw: Any, session: Any, model: Any, kind: str, batch: int, told: Prompt | None) -> None:
        self.draw, self.session, self.model, self.kind, self.batch, self.told = draw, session, model, kind, batch, told
        self.twin = model_of(kind, "eager")
        self.talks: list[Conversation] = []
        self.refused = self.right = 0

    def prompt(self) -> Prompt:
        if self.told is not None:
            seed = self.draw(st.integers(0, 99))
            fresh = prompt_of(seed, self.batch, 2, 3, [0] * self.batch, "left")
            return fresh
        pads = self.draw(st.lists(st.integers(0, 3), min_size=self.batch, max_size=self.batch))
        side = self.draw(st.sampled_from(["left", "right"]))
        before, behind = self.draw(st.integers(1, 4)), self.draw(st.integers(1, 5))
        return prompt_of(self.draw(st.integers(0, 99)), self.batch, before, behind, pads, side)

    def new_tokens(self, count: int) -> torch.Tensor:
        seed = self.draw(st.integers(0, 99))
        return torch.randint(1, 39, (self.batch, count), generator=torch.Generator().manual_seed(seed))

    def forward(self, talk: Conversation, new: torch.Tensor, first: bool, pixels: Any = None) -> None:
        """One forward of the model in the session, beside eager's, and the comparison."""
        held = talk.ids.shape[1] if talk.ids.numel() else 0
        talk.ids = new if not held else torch.cat([talk.ids, new], 1)
        total = talk.ids.shape[1]
        for keys in talk.keys:
            keys.extend(range(total - new.shape[1], total))
        ids = new if talk.cached else talk.ids
        padded = not bool(talk.attended().all())
        static = talk.cache is not None and hasattr(
            talk.cache.layers[0] if talk.cache.layers else None, "max_cache_len"
        )
        name = self.mask(padded)
        width = CAPACITY if static else len(talk.keys[0])
        arguments: dict[str, Any] = {
            "input_ids": ids, "attention_mask": mask_of(name, talk, ids.shape[1], width), "use_cache": talk.cached,
        }  # fmt: skip
        if first or not talk.cached:
            pixels = talk.prompt.pixels
        if pixels is not None:
            arguments["pixel_values"] = pixels.flatten(0, 1)
        rows = torch.full((self.batch,), ids.shape[1] - 1)
        if first and padded:
            rows = torch.stack([row.nonzero()[-1, 0] for row in talk.attended()])
        try:
            truth = truth_of(self.twin, talk, arguments, rows)
        except RuntimeError:
            # A mask of the model's own may not fit to keys that were cut out of one layer.
            with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
                self.model(**arguments, past_key_values=talk.cache)
            self.talks = [other for other in self.talks if other is not talk]
            return
        sane = talk.broken is None and name != "biased" and (name, self.implementation) != ("bool", "eager")
        try:
            with torch.no_grad():
                output = self.model(**arguments, past_key_values=talk.cache)
            found = self.session.maps
        except (TypeError, ValueError, RuntimeError) as error:
            assert REFUSAL.match(str(error)), error
            if sane:
                raise AssertionError(f"refused without a reason: {error}") from error
            self.refused += 1
            self.talks = [other for other in self.talks if other is not talk]
            return
        if talk.cached:
            talk.cache = output.past_key_values
        talk.loose = talk.loose and not first and new.shape[1] == 1
        talk.truths = [truth] if first or new.shape[1] > 1 else [*talk.truths, truth]
        self.compare(found, talk, whole=sane and talk.cached and not talk.loose)

    @property
    def implementation(self) -> str:
        return str(self.model.config.get_text_config()._attn_implementation)

    def mask(self, padded: bool) -> str:
        if self.kind == "mistral":
            return "2d" if padded else self.draw(st.sampled_from(MASKS[:2]))
        return self.draw(st.sampled_from(MASKS[1 if padded else 0 :]))

    def compare(self, found: Any, talk: Conversation, whole: bool) -> None:
        steps = len(found.steps)
        assert not whole or steps == len(talk.truths), (steps, len(talk.truths))
        expected = torch.stack(talk.truths[-steps:], 2)
        values, valid = found.values[:, :, :, -1], found.valid[:, :, :, -1]
        shown = expected.sum(-1) > 0
        assert torch.equal(valid, shown), (valid, shown)
        assert torch.allclose(values, expected, rtol=1e-3, atol=1e-6), (values - expected).abs().max()
        self.right += 1

    def run(self, operation: str) -> None:
        if operation == "prompt" or not self.talks:
            self.begin(self.draw(st.sampled_from(CACHES)))
            return
        talk = self.draw(st.sampled_from(self.talks))
        if talk.ids.shape[1] > CAPACITY - 10:
            return
        getattr(self, f"on_{operation}")(talk)
        # What was done to a cache shows in the next forward.
        if operation in ("crop", "evict", "aside") and any(other is talk for other in self.talks):
            self.on_step(talk) if self.draw(st.booleans()) else self.on_turn(talk)

    def begin(self, name: str, held: Any = None) -> None:
        prompt = self.prompt()
        cache = new_cache(name, self.model) if held is None else held
        talk = Conversation(prompt, cache, name != "no cache")
        self.talks.append(talk)
        self.forward(talk, prompt.ids, True)

    def on_step(self, talk: Conversation) -> None:
        self.forward(talk, self.new_tokens(1), False)

    def on_turn(self, talk: Conversation) -> None:
        if talk.cached:
            self.forward(talk, self.new_tokens(self.draw(st.integers(2, 3))), False)

    def on_share(self, talk: Conversation) -> None:
        """Another prompt with another picture goes into the same cache, behind what it holds."""
        if not talk.cached:
            return
        more = prompt_of(self.draw(st.integers(0, 99)), self.batch, 1, 2, [0] * self.batch, "left")
        if self.told is None:
            talk.prompt.columns = torch.cat([talk.prompt.columns, talk.ids.shape[1] + more.columns], 1)
        talk.prompt.pixels = torch.cat([talk.prompt.pixels, more.pixels], 1)
        self.forward(talk, more.ids, False, more.pixels)

    def on_repeat(self, talk: Conversation) -> None:
        """The whole prompt and one more token, without a cache and perhaps under other pictures."""
        if talk.broken is not None or talk.ids.shape != (self.batch, len(talk.keys[0])):
            return
        other = copy.deepcopy(talk)
        other.cache, other.cached, other.truths = None, False, list(talk.truths)
        if self.draw(st.booleans()):
            other.truths = []
            other.prompt.pixels = -talk.prompt.pixels
        # The steps so far may be those of the repetition from here on.
        talk.loose = True
        self.talks.append(other)
        self.forward(other, self.new_tokens(1), False)

    def on_crop(self, talk: Conversation) -> None:
        if talk.cache is None or talk.broken is not None:
            return
        count = self.draw(st.integers(1, 3))
        last = int(talk.prompt.columns.max())
        if talk.ids.shape[1] - count <= last + 1:
            return
        try:
            talk.cache.crop(-count)
        except (RuntimeError, ValueError, AttributeError, NotImplementedError):
            talk.broken = "a crop that failed"
            return
        if self.kind == "mistral" and talk.ids.shape[1] >= WINDOW:
            talk.broken = "a window that was cropped"
        talk.ids = talk.ids[:, :-count]
        for keys in talk.keys:
            del keys[-count:]
        # What was cut into the prompt leaves no step behind it.
        talk.truths = talk.truths[:-count] if count < len(talk.truths) else []
        if not talk.truths:
            talk.broken = talk.broken or "cropped into its prompt"

    def on_evict(self, talk: Conversation) -> None:
        layers = [] if talk.cache is None else [each for each in talk.cache.layers if each.keys is not None]
        if not layers or any(hasattr(each, "max_cache_len") or each.is_sliding for each in layers):
            return
        chosen = range(LAYERS) if self.draw(st.booleans()) else [self.draw(st.integers(0, LAYERS - 1))]
        for number in chosen:
            layer, held = talk.cache.layers[number], len(talk.keys[number])
            gone = self.draw(st.integers(0, held - 2))
            left = [place for place in range(held) if place != gone]
            layer.keys, layer.values = layer.keys[:, :, left], layer.values[:, :, left]
            del talk.keys[number][gone]
        talk.broken = "keys were evicted"

    def on_reorder(self, talk: Conversation) -> None:
        if talk.cache is not None and self.batch > 1:
            talk.cache.reorder_cache(torch.arange(self.batch).roll(1))
            self.talks = [other for other in self.talks if other is not talk]
            with pytest.raises(ValueError, match=r"^cache: "), torch.no_grad():
                self.model(input_ids=self.new_tokens(1), past_key_values=talk.cache)
            self.refused += 1

    def on_fork(self, talk: Conversation) -> None:
        if talk.cache is None or talk.broken is not None:
            return
        other = copy.deepcopy(talk)
        other.truths = []
        other.broken = "another cache than the one that was prefilled"
        self.talks.append(other)
        self.forward(other, self.new_tokens(self.draw(st.integers(1, 2))), False)

    def on_reset(self, talk: Conversation) -> None:
        if talk.cache is not None and hasattr(talk.cache.layers[0], "max_cache_len"):
            talk.cache.reset()
            self.talks = [other for other in self.talks if other is not talk]
            self.begin("static", talk.cache)

    def on_aside(self, talk: Conversation) -> None:
        """The decoder alone writes to the cache, which no hook of the session sees."""
        if talk.cache is None or talk.broken is not None:
            return
        with torch.no_grad():
            self.model.model.language_model(input_ids=self.new_tokens(1), past_key_values=talk.cache, use_cache=True)
        talk.ids = torch.cat([talk.ids, torch.ones(self.batch, 1, dtype=torch.int64)], 1)
        for keys in talk.keys:
            keys.append(talk.ids.shape[1] - 1)
        talk.broken, talk.truths = "the cache was written to outside of the session", []

    def on_stop(self, talk: Conversation) -> None:
        """A forward that ends in the middle leaves some layers of the cache longer than others."""
        if talk.cache is None or talk.broken is not None:
            return

        def stop(*_: Any) -> None:
            raise Interrupted

        handle = self.model.model.language_model.layers[1].register_forward_hook(stop)
        try:
            with pytest.raises(Interrupted), torch.no_grad():
                self.model(input_ids=self.new_tokens(1), past_key_values=talk.cache)
        finally:
            handle.remove()
        self.talks = [other for other in self.talks if other is not talk]
        with pytest.raises(ValueError, match=r"^cache: "), torch.no_grad():
            self.model(input_ids=self.new_tokens(1), past_key_values=talk.cache)
        self.refused += 1

    def on_generate(self, talk: Conversation) -> None:
        """A generation, of a prompt of its own, or on from a cache."""
        on = talk.cache is not None and talk.broken is None and self.draw(st.booleans()) and bool(talk.attended().all())
        prompt = talk.prompt if on else self.prompt()
        fresh = Conversation(prompt)
        fresh.ids = torch.cat([talk.ids, self.new_tokens(2)], 1) if on else prompt.ids
        given: dict[str, Any] = {
            "input_ids": fresh.ids, "attention_mask": fresh.attended().long(), "max_new_tokens": 3, "do_sample": False,
            "use_cache": on or self.draw(st.booleans()),
        }  # fmt: skip
        if on:
            given["past_key_values"] = talk.cache
            self.talks = [other for other in self.talks if other is not talk]
        else:
            given["pixel_values"] = prompt.pixels.flatten(0, 1)
        with torch.no_grad():
            own = {**given, "past_key_values": copy.deepcopy(talk.cache)} if on else given
            told = self.twin.generate(**own, output_attentions=True, return_dict_in_generate=True)
            self.model.generate(**given)
        for step, attentions in enumerate(told.attentions):
            fresh.keys = [list(range(fresh.ids.shape[1] + step)) for _ in range(LAYERS)]
            rows = torch.full((self.batch,), attentions[0].shape[2] - 1)
            if step == 0 and not on:
                rows = torch.stack([row.nonzero()[-1, 0] for row in fresh.attended()])
            fresh.truths.append(gathered(attentions, fresh, rows))
        self.compare(self.session.maps, fresh, whole=True)


def play(data: st.DataObject) -> World:
    """One session from its first forward to its last."""
    kind, implementation = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(["sdpa", "eager"]))
    batch = data.draw(st.integers(1, 2))
    told = prompt_of(0, batch, 2, 3, [0] * batch, "left") if data.draw(st.booleans()) else None
    model = model_of(kind, implementation) if implementation == "sdpa" else eager_of(kind)
    tokens = None if told is None else told.columns
    assert tokens is None or tokens.shape == (batch, PICTURE_TOKENS)
    with warnings.catch_warnings(), capture_attention(model, layers="all", tokens=tokens) as session:
        warnings.simplefilter("ignore")
        world = World(data.draw, session, model, kind, batch, told)
        for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=7)):
            world.run(operation)
    return world


def eager_of(kind: str) -> Any:
    """An eager model beside the oracle, which has no session."""
    if kind not in _EAGER:
        _EAGER[kind] = copy.deepcopy(model_of(kind, "eager"))
    return _EAGER[kind]


_EAGER: dict[str, Any] = {}
_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **_SETTINGS)  # type: ignore[arg-type]
@given(data=st.data())
def test_each_map_is_eagers_or_refused(data: st.DataObject) -> None:
    play(data)


@pytest.mark.slow
@settings(max_examples=10_000, **_SETTINGS)  # type: ignore[arg-type]
@given(data=st.data())
def test_each_map_is_eagers_or_refused_in_long(data: st.DataObject) -> None:
    play(data)
