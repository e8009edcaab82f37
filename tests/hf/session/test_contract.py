"""The checks of transformers: they pass here, each can fail, and they run under untested versions."""

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

TAKES_FEATURES = keeps_features(family("qwen2_5_vl")[0])
# An untested version; an old one need not take image features.
UNTESTED = "5.99.0" if TAKES_FEATURES else "5.11.0"
needs_features = pytest.mark.skipif(not TAKES_FEATURES, reason="this transformers takes no image features")


@pytest.fixture(autouse=True)
def _not_run_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "_passed", False)
    monkeypatch.setattr(contract, "_logged", False)


def test_all_checks_pass() -> None:
    results = contract.results()
    assert len(results) >= 12
    assert {name: why for name, why in results.items() if why is not None} == {}


def test_the_checks_leave_no_trace() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        random = torch.random.get_rng_state()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            assert set(contract.results().values()) == {None}
        assert torch.get_default_dtype() is torch.float64
        assert torch.equal(torch.random.get_rng_state(), random)
    finally:
        torch.set_default_dtype(torch.float32)


def _no_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(caches, "_CACHES", ("kv_store",))


def _other_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(caches, "key_state", lambda cache, module: None)


def _other_crop(patch: pytest.MonkeyPatch) -> None:
    real = caches.key_state
    count = itertools.count()
    patch.setattr(caches, "key_state", lambda cache, module: real(cache, module)._replace(version=next(count)))


def _other_buffers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(caches, "_reach", lambda layer: caches.Reach(None, None))


def _other_scale(patch: pytest.MonkeyPatch) -> None:
    real = names.attention_options
    patch.setattr(names, "attention_options", lambda query, options: real(query, options)._replace(scale=1.0))


def _other_dropout(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "DROPOUT", "drop_rate")


def _no_eager(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_EAGER", "eager_attention")


def _no_registry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_REGISTRY", "ATTENTION_FUNCTIONS")


def _no_image_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_IMAGE_IDS", ("img_token_id",))


def _no_processors_of_logits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "_DECODING", ("logits_changers", "stopping_criteria"))


def _no_stored_positions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "position_modules", lambda model: [])


def _other_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "attention_in", lambda layer: None)


def _other_features(patch: pytest.MonkeyPatch) -> None:
    real = names.image_features

    def doubled(model: Any, entries: Any) -> Any:
        return real(model, {**entries, "pixel_values": 2 * entries["pixel_values"]})

    patch.setattr(names, "image_features", doubled)


def _no_features(patch: pytest.MonkeyPatch) -> None:
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
    "dropout": (_other_dropout, {"scale and mask"}),
    "eager": (_no_eager, {"eager lookup"}),
    "registry": (_no_registry, {"attention lookup", "map of a forward"}),
    "image token": (_no_image_token, {"image token", "map of a forward"}),
    "custom decoding": (_no_processors_of_logits, {"custom decoding"}),
    "positions": (_no_stored_positions, {"stored positions"}),
    "attention": (_other_attention, {"decoder and attention", "map of a forward"}),
    "features": (_other_features, {"image features"}),
    "no features": (_no_features, {"image features"}),
    "processor": (_no_processors, {"processor parts"}),
    "compiled": (_no_compiled_call, {"compiled calls"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_features) if name == "features" else name for name in BREAKS]
)
def test_a_change_upstream_fails_a_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = BREAKS[name]
    change(monkeypatch)
    failed = {check for check, why in contract.results().items() if why is not None}
    assert expected <= failed


def test_a_tested_version_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: "5.20.2")
    monkeypatch.setattr(contract, "results", lambda: pytest.fail("the checks ran"))
    capture_attention(family("llava")[0], layers=[0])


def test_an_untested_version_is_checked_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(names, "version", lambda: UNTESTED)
    model, processor = family("llava")
    with caplog.at_level(logging.WARNING, "carve_kernels"):
        capture_attention(model, layers=[0])
        capture_attention(model, layers=[1])
        CarveEngine(model, processor)
    assert [record.getMessage() for record in caplog.records] == [
        f"transformers {UNTESTED} was not tested (5.12 to 5.24 were): all {len(contract.CHECKS)} checks pass"
    ]


def test_a_failed_check_is_an_error_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: UNTESTED)
    _no_cache(monkeypatch)
    model, processor = family("llava")
    for _ in range(2):
        message = rf"transformers {UNTESTED} .*5\.12 to 5\.24.*cache on the second step"
        with pytest.raises(UpstreamChanged, match=message):
            capture_attention(model, layers=[0])
    with pytest.raises(UpstreamChanged, match="cache on the second step"):
        CarveEngine(model, processor)


def test_the_version_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: UNTESTED)
    _no_cache(monkeypatch)
    with pytest.raises(UpstreamChanged) as caught:
        capture_attention(family("llava")[0], layers=[0])
    assert str(caught.value).count(UNTESTED) == 1


def test_the_checks_run_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: UNTESTED)
    with monkeypatch.context() as patch, pytest.raises(UpstreamChanged):
        _no_cache(patch)
        contract.ensure()
    contract.ensure()


def test_models_running_in_other_threads_do_not_matter() -> None:
    """A server may be generating when the first session opens."""
    model = family("qwen2_5_vl")[0]
    ids = torch.arange(1, 8)[None]
    stop = threading.Event()

    def generate() -> None:
        with torch.no_grad():
            while not stop.is_set():
                model.model.language_model(input_ids=ids)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        assert set(contract.results().values()) == {None}
    finally:
        stop.set()
        thread.join()


def test_a_replaced_attention_function_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    entry = ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"]
    assert set(contract.results().values()) == {None}
    assert ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"] is entry


def test_open_sessions_and_fake_tensors_do_not_matter() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with capture_attention(family("llava")[0], layers=[0]), FakeTensorMode():
        assert set(contract.results().values()) == {None}
