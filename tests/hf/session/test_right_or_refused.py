"""Forwards, caches and masks in any order in one session: each map equals eager's, or an error says why not."""

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
    IMAGE_TOKENS,
    KINDS,
    LAYERS,
    MASKS,
    WINDOW,
    Conversation,
    Prompt,
    expected_maps,
    gather_maps,
    mask_of,
    model_of,
    new_cache,
    prompt_of,
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
    """Raised by a hook of the test."""


class World:
    """One session on a model, an eager twin for the expected maps, and the conversations in the session."""

    def __init__(self, draw: Any, session: Any, model: Any, kind: str, batch: int, fixed: Prompt | None) -> None:
        self.draw, self.session, self.model = draw, session, model
        self.kind, self.batch, self.fixed = kind, batch, fixed
        self.twin = model_of(kind, "eager")
        self.talks: list[Conversation] = []
        self.refused = self.right = 0

    def prompt(self) -> Prompt:
        if self.fixed is not None:
            seed = self.draw(st.integers(0, 99))
            return prompt_of(seed, self.batch, 2, 3, [0] * self.batch, "left")
        pads = self.draw(st.lists(st.integers(0, 3), min_size=self.batch, max_size=self.batch))
        side = self.draw(st.sampled_from(["left", "right"]))
        before, after = self.draw(st.integers(1, 4)), self.draw(st.integers(1, 5))
        return prompt_of(self.draw(st.integers(0, 99)), self.batch, before, after, pads, side)

    def new_tokens(self, count: int) -> torch.Tensor:
        seed = self.draw(st.integers(0, 99))
        return torch.randint(1, 39, (self.batch, count), generator=torch.Generator().manual_seed(seed))

    def forward(self, talk: Conversation, new: torch.Tensor, first: bool, pixels: Any = None) -> None:
        """One forward of the model in the session, one under eager, and the comparison."""
        talk.ids = new if not talk.ids.numel() else torch.cat([talk.ids, new], 1)
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
            expected = expected_maps(self.twin, talk, arguments, rows)
        except RuntimeError:
            # The model's own mask may not fit the keys after one layer has lost some.
            with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
                self.model(**arguments, past_key_values=talk.cache)
            self.talks = [other for other in self.talks if other is not talk]
            return
        valid = talk.broken is None and name != "biased" and (name, self.implementation) != ("bool", "eager")
        try:
            with torch.no_grad():
                output = self.model(**arguments, past_key_values=talk.cache)
            maps = self.session.maps
        except (TypeError, ValueError, RuntimeError) as error:
            assert REFUSAL.match(str(error)), error
            if valid:
                raise AssertionError(f"refused without a reason: {error}") from error
            self.refused += 1
            self.talks = [other for other in self.talks if other is not talk]
            return
        if talk.cached:
            talk.cache = output.past_key_values
        talk.loose = talk.loose and not first and new.shape[1] == 1
        talk.expected = [expected] if first or new.shape[1] > 1 else [*talk.expected, expected]
        self.compare(maps, talk, complete=valid and talk.cached and not talk.loose)

    @property
    def implementation(self) -> str:
        return str(self.model.config.get_text_config()._attn_implementation)

    def mask(self, padded: bool) -> str:
        if self.kind == "mistral":
            return "2d" if padded else self.draw(st.sampled_from(MASKS[:2]))
        return self.draw(st.sampled_from(MASKS[1 if padded else 0 :]))

    def compare(self, maps: Any, talk: Conversation, complete: bool) -> None:
        steps = len(maps.steps)
        assert not complete or steps == len(talk.expected), (steps, len(talk.expected))
        expected = torch.stack(talk.expected[-steps:], 2)
        values, valid = maps.values[:, :, :, -1], maps.valid[:, :, :, -1]
        visible = expected.sum(-1) > 0
        assert torch.equal(valid, visible), (valid, visible)
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
        # A change of a cache has an effect in the next forward.
        if operation in ("crop", "evict", "aside") and any(other is talk for other in self.talks):
            self.on_step(talk) if self.draw(st.booleans()) else self.on_turn(talk)

    def begin(self, name: str, filled: Any = None) -> None:
        prompt = self.prompt()
        cache = new_cache(name, self.model) if filled is None else filled
        talk = Conversation(prompt, cache, name != "no cache")
        self.talks.append(talk)
        self.forward(talk, prompt.ids, True)

    def on_step(self, talk: Conversation) -> None:
        self.forward(talk, self.new_tokens(1), False)

    def on_turn(self, talk: Conversation) -> None:
        if talk.cached:
            self.forward(talk, self.new_tokens(self.draw(st.integers(2, 3))), False)

    def on_share(self, talk: Conversation) -> None:
        """Another prompt with another image is appended to the same cache."""
        if not talk.cached:
            return
        more = prompt_of(self.draw(st.integers(0, 99)), self.batch, 1, 2, [0] * self.batch, "left")
        if self.fixed is None:
            talk.prompt.columns = torch.cat([talk.prompt.columns, talk.ids.shape[1] + more.columns], 1)
        talk.prompt.pixels = torch.cat([talk.prompt.pixels, more.pixels], 1)
        self.forward(talk, more.ids, False, more.pixels)

    def on_repeat(self, talk: Conversation) -> None:
        """The whole prompt and one more token, without a cache and perhaps with other images."""
        if talk.broken is not None or talk.ids.shape != (self.batch, len(talk.keys[0])):
            return
        other = copy.deepcopy(talk)
        other.cache, other.cached, other.expected = None, False, list(talk.expected)
        if self.draw(st.booleans()):
            other.expected = []
            other.prompt.pixels = -talk.prompt.pixels
        # From here on the steps so far may belong to the repetition.
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
            talk.broken = "a cropped window"
        talk.ids = talk.ids[:, :-count]
        for keys in talk.keys:
            del keys[-count:]
        # A crop into the prompt leaves no steps.
        talk.expected = talk.expected[:-count] if count < len(talk.expected) else []
        if not talk.expected:
            talk.broken = talk.broken or "cropped into its prompt"

    def on_evict(self, talk: Conversation) -> None:
        layers = [] if talk.cache is None else [each for each in talk.cache.layers if each.keys is not None]
        if not layers or any(hasattr(each, "max_cache_len") or each.is_sliding for each in layers):
            return
        selected = range(LAYERS) if self.draw(st.booleans()) else [self.draw(st.integers(0, LAYERS - 1))]
        for number in selected:
            layer, count = talk.cache.layers[number], len(talk.keys[number])
            gone = self.draw(st.integers(0, count - 2))
            rest = [index for index in range(count) if index != gone]
            layer.keys, layer.values = layer.keys[:, :, rest], layer.values[:, :, rest]
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
        other.expected = []
        other.broken = "a copy of the cache that was prefilled"
        self.talks.append(other)
        self.forward(other, self.new_tokens(self.draw(st.integers(1, 2))), False)

    def on_reset(self, talk: Conversation) -> None:
        if talk.cache is not None and hasattr(talk.cache.layers[0], "max_cache_len"):
            talk.cache.reset()
            self.talks = [other for other in self.talks if other is not talk]
            self.begin("static", talk.cache)

    def on_aside(self, talk: Conversation) -> None:
        """The decoder alone writes to the cache, which the session's hooks miss."""
        if talk.cache is None or talk.broken is not None:
            return
        with torch.no_grad():
            self.model.model.language_model(input_ids=self.new_tokens(1), past_key_values=talk.cache, use_cache=True)
        talk.ids = torch.cat([talk.ids, torch.ones(self.batch, 1, dtype=torch.int64)], 1)
        for keys in talk.keys:
            keys.append(talk.ids.shape[1] - 1)
        talk.broken, talk.expected = "the cache was written to outside of the session", []

    def on_stop(self, talk: Conversation) -> None:
        """An interrupted forward leaves some layers of the cache longer than others."""
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
        """A generation, of a new prompt or continuing a cache."""
        resumes = (
            talk.cache is not None and talk.broken is None and self.draw(st.booleans()) and bool(talk.attended().all())
        )
        prompt = talk.prompt if resumes else self.prompt()
        generated = Conversation(prompt)
        generated.ids = torch.cat([talk.ids, self.new_tokens(2)], 1) if resumes else prompt.ids
        given: dict[str, Any] = {
            "input_ids": generated.ids, "attention_mask": generated.attended().long(), "max_new_tokens": 3,
            "do_sample": False, "use_cache": resumes or self.draw(st.booleans()),
        }  # fmt: skip
        if resumes:
            given["past_key_values"] = talk.cache
            self.talks = [other for other in self.talks if other is not talk]
        else:
            given["pixel_values"] = prompt.pixels.flatten(0, 1)
        with torch.no_grad():
            arguments = {**given, "past_key_values": copy.deepcopy(talk.cache)} if resumes else given
            outputs = self.twin.generate(**arguments, output_attentions=True, return_dict_in_generate=True)
            self.model.generate(**given)
        for step, attentions in enumerate(outputs.attentions):
            generated.keys = [list(range(generated.ids.shape[1] + step)) for _ in range(LAYERS)]
            rows = torch.full((self.batch,), attentions[0].shape[2] - 1)
            if step == 0 and not resumes:
                rows = torch.stack([row.nonzero()[-1, 0] for row in generated.attended()])
            generated.expected.append(gather_maps(attentions, generated, rows))
        self.compare(self.session.maps, generated, complete=True)


def play(data: st.DataObject) -> World:
    """One session with random operations."""
    kind, implementation = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(["sdpa", "eager"]))
    batch = data.draw(st.integers(1, 2))
    fixed = prompt_of(0, batch, 2, 3, [0] * batch, "left") if data.draw(st.booleans()) else None
    model = model_of(kind, implementation) if implementation == "sdpa" else eager_of(kind)
    tokens = None if fixed is None else fixed.columns
    assert tokens is None or tokens.shape == (batch, IMAGE_TOKENS)
    # Steps that attend and capture in one operator, or the capture after each attention.
    options: dict[str, Any] = data.draw(st.sampled_from([{}, {"backend": "reference", "fused": True}]))
    with warnings.catch_warnings(), capture_attention(model, layers="all", tokens=tokens, **options) as session:
        warnings.simplefilter("ignore")
        world = World(data.draw, session, model, kind, batch, fixed)
        for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=7)):
            world.run(operation)
    return world


def eager_of(kind: str) -> Any:
    """An eager model besides the twin, which has no session."""
    if kind not in _EAGER:
        _EAGER[kind] = copy.deepcopy(model_of(kind, "eager"))
    return _EAGER[kind]


_EAGER: dict[str, Any] = {}
_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **_SETTINGS)  # type: ignore[arg-type]
@given(data=st.data())
def test_each_map_equals_eagers_or_is_refused(data: st.DataObject) -> None:
    play(data)


@pytest.mark.slow
@settings(max_examples=10_000, **_SETTINGS)  # type: ignore[arg-type]
@given(data=st.data())
def test_each_map_equals_eagers_or_is_refused_in_many_examples(data: st.DataObject) -> None:
    play(data)
