"""The contract with transformers: it holds here, its checks can fail, and it is asked for where nobody has tested."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, capture_attention
from carve_kernels.checks import UpstreamChanged
from carve_kernels.hf import caches, names
from carve_kernels.hf.session import contract
from tests.support.families import family, keeps_features

TAKES_RESULTS = keeps_features(family("qwen2_5_vl")[0])
# Nobody has tested these; one as old as this transformers need not take results of a vision tower.
UNTESTED = "5.99.0" if TAKES_RESULTS else "5.11.0"
needs_results = pytest.mark.skipif(not TAKES_RESULTS, reason="this transformers takes no results of a vision tower")


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has asked yet."""
    monkeypatch.setattr(contract, "_held", False)
    monkeypatch.setattr(contract, "_told", False)


def test_it_holds_here() -> None:
    results = names.contract()
    assert len(results) >= 12
    assert {name: why for name, why in results.items() if why is not None} == {}


def test_it_leaves_no_trace() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        random = torch.random.get_rng_state()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            assert set(names.contract().values()) == {None}
        assert torch.get_default_dtype() is torch.float64
        assert torch.equal(torch.random.get_rng_state(), random)
    finally:
        torch.set_default_dtype(torch.float32)


def _no_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(caches, "_CACHES", ("kv_store",))


def _other_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(caches, "mark", lambda cache, module: None)


def _other_crop(patch: pytest.MonkeyPatch) -> None:
    real = caches.mark
    count = itertools.count()
    patch.setattr(caches, "mark", lambda cache, module: real(cache, module)._replace(version=next(count)))


def _other_buffers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(caches, "reach", lambda cache, module: caches.Reach(None, None))


def _other_scale(patch: pytest.MonkeyPatch) -> None:
    real = names.attention_options
    patch.setattr(names, "attention_options", lambda query, told: real(query, told)._replace(scale=1.0))


def _no_eager(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_EAGER", "eager_attention")


def _no_registry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_REGISTRY", "ATTENTION_FUNCTIONS")


def _no_image_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_IMAGE_IDS", ("picture_token_id",))


def _no_decisions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_DECISIONS", ("logits_changers", "stopping_criteria"))


def _no_notes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "position_notes", lambda model: [])


def _other_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "attention_in", lambda layer: None)


def _other_tower(patch: pytest.MonkeyPatch) -> None:
    real = names.tower_results

    def doubled(model: Any, entries: Any) -> Any:
        return real(model, {**entries, "pixel_values": 2 * entries["pixel_values"]})

    patch.setattr(names, "tower_results", doubled)


def _no_tower(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "version", lambda: "5.25.0")
    patch.setattr(names, "_TOWER", "encoder_results")


def _no_processors(patch: pytest.MonkeyPatch) -> None:
    patch.delattr("transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES")


def _no_compiled_call(patch: pytest.MonkeyPatch) -> None:
    patch.delattr("transformers.PreTrainedModel.get_compiled_call")


BREAKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "cache": (_no_cache, {"cache on the second step", "maps of generate"}),
    "keys": (_other_keys, {"cache on the second step"}),
    "crop": (_other_crop, {"cache on the second step"}),
    "buffers": (_other_buffers, {"cache on the second step"}),
    "scale": (_other_scale, {"scale and mask", "map of a forward", "maps of generate"}),
    "eager": (_no_eager, {"eager is looked up"}),
    "registry": (_no_registry, {"attention is looked up", "map of a forward"}),
    "image token": (_no_image_token, {"image token", "map of a forward"}),
    "decisions": (_no_decisions, {"decision hooks"}),
    "notes": (_no_notes, {"position notes"}),
    "attention": (_other_attention, {"decoder and attention", "map of a forward"}),
    "tower": (_other_tower, {"tower results"}),
    "no tower": (_no_tower, {"tower results"}),
    "processor": (_no_processors, {"processor parts"}),
    "compiled": (_no_compiled_call, {"compiled calls"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_results) if name == "tower" else name for name in BREAKS]
)
def test_a_change_upstream_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = BREAKS[name]
    change(monkeypatch)
    failed = {check for check, why in names.contract().items() if why is not None}
    assert expected <= failed


def test_a_tested_version_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: "5.20.2")
    monkeypatch.setattr(contract, "results", lambda: pytest.fail("the checks ran"))
    capture_attention(family("llava")[0], layers=[0])


def test_a_version_that_was_not_tested_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(names, "version", lambda: UNTESTED)
    model, processor = family("llava")
    with caplog.at_level(logging.WARNING, "carve_kernels"):
        capture_attention(model, layers=[0])
        capture_attention(model, layers=[1])
        CarveEngine(model, processor)
    assert [record.getMessage() for record in caplog.records] == [
        f"transformers {UNTESTED} was not tested (5.12 to 5.24 were): {len(contract.CHECKS)} checks of it hold"
    ]


def test_a_broken_contract_is_an_error_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: UNTESTED)
    _no_cache(monkeypatch)
    model, processor = family("llava")
    for _ in range(2):
        said = rf"transformers {UNTESTED} .*5\.12 to 5\.24.*cache on the second step"
        with pytest.raises(UpstreamChanged, match=said):
            capture_attention(model, layers=[0])
    with pytest.raises(UpstreamChanged, match="cache on the second step"):
        CarveEngine(model, processor)


def test_what_failed_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: UNTESTED)
    _no_cache(monkeypatch)
    with pytest.raises(UpstreamChanged) as caught:
        capture_attention(family("llava")[0], layers=[0])
    assert str(caught.value).count(UNTESTED) == 1


def test_a_failure_that_has_passed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: UNTESTED)
    with monkeypatch.context() as patch, pytest.raises(UpstreamChanged):
        _no_cache(patch)
        contract.ensure()
    contract.ensure()


def test_models_at_work_in_other_threads_are_no_fault() -> None:
    """A server may be generating when the first session is opened."""
    model = family("qwen2_5_vl")[0]
    ids = torch.arange(1, 8)[None]
    stop = threading.Event()

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                model.model.language_model(input_ids=ids)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert set(names.contract().values()) == {None}
    finally:
        stop.set()
        thread.join()


def test_an_attention_function_of_ones_own_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    own = ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"]
    assert set(names.contract().values()) == {None}
    assert ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"] is own


def test_open_sessions_and_fake_tensors_are_no_fault() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with capture_attention(family("llava")[0], layers=[0]), FakeTensorMode():
        assert set(names.contract().values()) == {None}
