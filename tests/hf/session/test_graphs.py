"""Decode steps in CUDA graphs inside a session: each replay is a step, and the maps are those of eager steps.

On a CPU a fake records and replays the operators; the tests marked `gpu` are the same ones with real graphs.
"""

from __future__ import annotations

import copy
import gc
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache, StaticCache

from carve_kernels import AttentionMaps, capture_attention
from tests.support.families import family, inputs_of
from tests.support.graphs import Graphs, Operators, capturing, pool_bytes

TOKENS = [70, 45, 12, 33, 51, 8]
CAPACITY = 100
DOCS = Path(__file__).resolve().parents[3] / "docs" / "decoding.md"
BOTH = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Decoder:
    """A model with a static cache on a device, and a graph of its decode step."""

    def __init__(
        self, device: str, graphs: Graphs | None = None, name: str = "llava", capacity: int = CAPACITY
    ) -> None:
        self.device = torch.device(device)
        self.model = copy.deepcopy(family(name)[0]).to(self.device)
        self.graphs = graphs or Graphs(self.device)
        self.cache: Any = static(self.model, capacity)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.graph: Any = None
        self.logits: Any = None

    def prefill(self, number: int = 0, name: str = "llava", cache: Any = None) -> None:
        inputs = inputs_of(name, number + 1)
        text = {key: value[number:].to(self.device) for key, value in inputs.items() if key != "attention_mask"}
        with torch.no_grad():
            self.model(**text, past_key_values=self.cache if cache is None else cache, use_cache=True)

    def run(self) -> Any:
        return self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits

    def step(self, token: int) -> torch.Tensor:
        self.token.fill_(token)
        with torch.no_grad():
            return self.run().clone()

    def capture(self) -> None:
        self.graph, self.logits = self.graphs.capture(self.run)

    def replay(self, token: int) -> torch.Tensor:
        self.token.fill_(token)
        self.graph.replay()
        return self.logits.clone()


def static(model: Any, capacity: int = CAPACITY) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=capacity)


def eager_maps(device: str, tokens: list[int], number: int = 0, **options: Any) -> AttentionMaps:
    decoder = Decoder(device)
    with capture_attention(decoder.model, **{"layers": [1, 2], **options}) as session:
        decoder.prefill(number)
        for token in tokens:
            decoder.step(token)
    return session.maps


def same(one: AttentionMaps, other: AttentionMaps) -> None:
    assert one.steps == other.steps and torch.equal(one.tokens, other.tokens) and torch.equal(one.valid, other.valid)
    assert torch.allclose(one.values, other.values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("eager", [0, 2])
def test_each_replay_is_a_step(device: str, eager: int) -> None:
    plain = Decoder(device)
    plain.prefill()
    expected = [plain.step(token) for token in TOKENS]
    decoder = Decoder(device)
    with capture_attention(decoder.model, layers=[1, 2]) as session:
        decoder.prefill()
        logits = [decoder.step(token) for token in TOKENS[:eager]]
        decoder.capture()
        assert session.maps.steps == tuple(range(eager + 1))
        logits += [decoder.replay(token) for token in TOKENS[eager:4]]
        same(session.maps, eager_maps(device, TOKENS[:4]))
        # An eager step follows, and replays go on after it.
        logits += [decoder.step(TOKENS[4]), decoder.replay(TOKENS[5])]
    assert torch.allclose(torch.stack(logits), torch.stack(expected), rtol=1e-3, atol=1e-4)
    same(session.maps, eager_maps(device, TOKENS))


@pytest.mark.parametrize("device", BOTH)
def test_one_graph_serves_the_next_prompt_in_the_same_cache(device: str) -> None:
    decoder = Decoder(device)
    with capture_attention(decoder.model, layers=[1, 2]) as session:
        decoder.prefill()
        decoder.step(TOKENS[0])
        decoder.capture()
        decoder.replay(TOKENS[1])
        first = session.maps
        decoder.cache.reset()
        decoder.prefill(1)
        assert session.maps.steps == (0,)
        for token in TOKENS[2:5]:
            decoder.replay(token)
        second = session.maps
    same(first, eager_maps(device, TOKENS[:2]))
    same(second, eager_maps(device, TOKENS[2:5], 1))


@pytest.mark.parametrize("device", BOTH)
def test_graphs_of_two_prompts_share_a_pool_with_a_plain_one(device: str) -> None:
    graphs = Graphs(torch.device(device))
    plain, one, other = Decoder(device, graphs), Decoder(device, graphs), Decoder(device, graphs)
    other.model = plain.model = one.model
    plain.prefill()
    plain.step(TOKENS[0])
    plain.capture()
    maps = {}
    with capture_attention(one.model, layers=[1, 2]) as session:
        for number, decoder in enumerate((one, other)):
            decoder.prefill(number)
            decoder.step(TOKENS[0])
            decoder.capture()
            for token in TOKENS[1:4]:
                decoder.replay(token)
                plain.replay(token)
            maps[number] = session.maps
        for number in maps:
            same(maps[number], eager_maps(device, TOKENS[:4], number))
        one.replay(TOKENS[4])
        with pytest.raises(ValueError, match=r"^maps: expected replays of CUDA graphs"):
            _ = session.maps


@pytest.mark.parametrize("device", BOTH)
def test_replays_beyond_max_steps_are_not_captured(device: str, caplog: pytest.LogCaptureFixture) -> None:
    decoder = Decoder(device)
    with capture_attention(decoder.model, layers=[1, 2], max_steps=3) as session:
        decoder.prefill()
        decoder.capture()
        for token in TOKENS:
            decoder.replay(token)
        with caplog.at_level(logging.WARNING, "carve_kernels"):
            maps = session.maps
        decoder.step(1)
        assert session.maps.steps == (0, 1, 2)
    assert "max_steps: steps of this generation from 3 on are not captured" in caplog.text
    same(maps, eager_maps(device, TOKENS[:2]))


@pytest.mark.parametrize("device", BOTH)
def test_an_end_token_ends_the_maps_of_replays(device: str) -> None:
    decoder = Decoder(device)
    end = decoder.model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    with capture_attention(decoder.model, layers=[1, 2]) as session:
        decoder.prefill()
        decoder.capture()
        for token in (*TOKENS[:2], end, TOKENS[3]):
            decoder.replay(token)
    same(session.maps, eager_maps(device, TOKENS[:2]))


@pytest.mark.parametrize("device", BOTH)
def test_a_graph_may_be_replayed_after_its_session(device: str) -> None:
    decoder = Decoder(device)
    with capture_attention(decoder.model, layers=[1, 2]) as session:
        decoder.prefill()
        decoder.capture()
        record: Any = session._trackers[0].record
        kept = [StorageWeakRef(each.untyped_storage()) for each in (record.state.later.maps, record.state.counts)]
    del session, record
    gc.collect()
    # A graph holds addresses only, so their memory stays until the cache, which it needs as well, is gone.
    assert not any(each.expired() for each in kept)
    decoder.replay(TOKENS[0])
    decoder.cache = decoder.graph = None
    gc.collect()
    assert all(each.expired() for each in kept)


@pytest.mark.gpu
def test_replays_on_another_stream() -> None:
    decoder, stream = Decoder("cuda"), torch.cuda.Stream()
    with capture_attention(decoder.model, layers=[1, 2]) as session:
        decoder.prefill()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decoder.step(TOKENS[0])
        torch.cuda.current_stream().wait_stream(stream)
        decoder.capture()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for token in TOKENS[1:4]:
                decoder.replay(token)
        torch.cuda.current_stream().wait_stream(stream)
    same(session.maps, eager_maps("cuda", TOKENS[:4]))


@pytest.mark.gpu
def test_the_graph_of_the_docs() -> None:
    code = re.search(r"```py\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    model, inputs = copy.deepcopy(family("llava")[0]).cuda(), inputs_of("llava", 1).to("cuda")
    names = {"torch": torch, "StaticCache": StaticCache, "capture_attention": capture_attention}
    names |= {"model": model, "inputs": inputs}
    exec(code[1], names)
    maps: Any = names["maps"]
    assert len(maps.steps) == int(maps.valid[0, 0, :, 0].sum()) <= 102
    with capture_attention(model, layers=[3], max_steps=256) as session:
        model.generate(
            **inputs, max_new_tokens=102, do_sample=False, cache_implementation="static", disable_compile=True
        )
    same(maps, session.maps)


@pytest.mark.gpu
def test_many_replays_keep_the_size_of_the_pool() -> None:
    decoder = Decoder("cuda", capacity=400)
    with capture_attention(decoder.model, layers="all", max_steps=300) as session:
        decoder.prefill()
        decoder.step(TOKENS[0])
        decoder.capture()
        decoder.replay(TOKENS[1])
        before = pool_bytes()
        for _ in range(200):
            decoder.replay(TOKENS[2])
        assert pool_bytes() == before
    assert len(session.maps.steps) == 203


def refusals() -> dict[str, tuple[str, Callable[[Decoder], None], dict[str, Any]]]:
    def dynamic(decoder: Decoder) -> None:
        decoder.cache = DynamicCache()
        decoder.prefill()

    def sliding(decoder: Decoder) -> None:
        config = copy.deepcopy(decoder.model.config.get_text_config())
        config.sliding_window, config.layer_types = 16, ["full_attention", "sliding_attention"] * 2
        decoder.cache = StaticCache(config=config, max_cache_len=CAPACITY)
        decoder.prefill()

    def nothing(_decoder: Decoder) -> None:
        pass

    return {
        "a cache that grows": ("cache: expected a static cache", dynamic, {}),
        "a window": ("cache: expected a static cache without sliding windows", sliding, {}),
        "no prompt": ("model: expected one token after a cache of this session", nothing, {}),
        "a function": (
            "on_layer: expected None in a CUDA graph", Decoder.prefill, {"on_layer": lambda *_arguments: None},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("name", refusals())
def test_what_a_graph_cannot_capture_is_refused(name: str, device: str) -> None:
    message, prepare, options = refusals()[name]
    decoder = Decoder(device)
    with capture_attention(decoder.model, layers=[1, 2], **options):
        prepare(decoder)
        with pytest.raises(ValueError, match=message):
            decoder.capture()


def test_a_step_in_a_graph_keeps_no_memory() -> None:
    decoder = Decoder("cpu")
    with capture_attention(decoder.model, layers="all") as session:
        decoder.prefill()
        decoder.step(TOKENS[0])
        for graph in (False, True, True):
            with torch.no_grad(), Operators() as operators:
                if graph:
                    with capturing():
                        decoder.run()
                else:
                    decoder.run()
            gc.collect()
            assert operators.left() == []
    assert session is not None


@pytest.mark.parametrize("static_cache", [False, True])
@pytest.mark.parametrize("layers", [[1], [0, 1, 2, 3]])
def test_a_step_costs_few_operators(layers: list[int], static_cache: bool) -> None:
    counts = []
    for is_session in (False, True):
        decoder = Decoder("cpu")
        decoder.cache = decoder.cache if static_cache else DynamicCache()
        session = capture_attention(decoder.model, layers=layers)
        if is_session:
            session.__enter__()
        decoder.prefill()
        for token in TOKENS[:3]:
            decoder.token.fill_(token)
            with torch.no_grad(), Operators() as operators:
                decoder.run()
        session.__exit__(None, None, None)
        counts.append(Counter(operators.names))
    # The number of tokens in a static cache is read, on a CPU.
    expected = ["aten._local_scalar_dense.default"] * static_cache + [
        "aten.add_.Tensor", "aten.index_copy_.default", "carve_kernels.capture_layers.default",
    ]  # fmt: skip
    assert not counts[0] - counts[1]
    assert counts[1] - counts[0] == Counter(expected)
