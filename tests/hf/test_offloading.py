"""Models with offloaded weights: they run where accelerate loads them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf.decoding import sequential_reason
from carve_kernels.hf.engine.fingerprint import Unidentified, fingerprint
from carve_kernels.hf.model import decoder_layers, devices_of, input_device
from tests.support.families import family, generate
from tests.support.offloading import offload
from tests.support.tiny_models import inputs_for, make_image, save, tiny_llava, tiny_qwen2_5_vl

QUESTION = "what digit is red"
PHOTO = make_image(240, 160, 1)
PRESET = Preset.paper(layers=(1, 2), max_new_tokens=4)
WHICH: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "the last layers": lambda name: ".layers.2" in name or ".layers.3" in name,
    "parts of a layer": lambda name: "layers.1.self_attn.q_proj" in name or "layers.2.mlp" in name,
    "the embedding": lambda name: "embed_tokens" in name,
}


@pytest.mark.parametrize("which", WHICH)
def test_an_engine_and_a_session_work(which: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = CarveEngine(*family("llava"), preset=PRESET)(PHOTO, QUESTION)
    model, processor = tiny_llava()
    offload(model, WHICH[which])
    inputs = inputs_for(processor, [PHOTO], [QUESTION])
    with capture_attention(model, layers=[1, 2]) as session:
        generate(model, inputs, steps=3)
    truth = expected.task.values[0, :, 0]
    assert float((session.maps.values[0, :, 0] - truth).abs().max()) <= 1e-5 * float(truth.max())
    engine = CarveEngine(model, processor, preset=PRESET)
    assert engine.sequential_reason is None and input_device(model) == torch.device("cpu")
    with caplog.at_level(logging.INFO, logger="carve_kernels"):
        results = [engine(PHOTO, QUESTION) for _ in range(2)]
    assert all(result.answer_ids == expected.answer_ids for result in results)
    assert all(torch.equal(result.general.values, expected.general.values) for result in results)
    # Offloaded weights cannot be compared with others.
    assert "nothing is cached for this model, since" in caplog.text and sum(engine.memory.held()) == 0


def test_models_that_differ_in_offloaded_weights_share_no_memory() -> None:
    (one, processor), (other, _) = tiny_qwen2_5_vl(), tiny_qwen2_5_vl(seed=1)
    for model in (one, other):
        offload(model)
        with pytest.raises(Unidentified, match="offloaded"):
            fingerprint(model, processor)
    memory = CarveEngine(one, processor, preset=PRESET).memory
    CarveEngine(one, processor, preset=PRESET, memory=memory)(PHOTO, QUESTION)
    result = CarveEngine(other, processor, preset=PRESET, memory=memory)(PHOTO, QUESTION)
    expected = CarveEngine(other, processor, preset=PRESET, memory=False)(PHOTO, QUESTION)
    assert torch.equal(result.general.values, expected.general.values)


def test_devices_of_layers() -> None:
    model = tiny_llava()[0]
    offload(model.model.language_model.layers[:2], device="cuda:0")
    offload(model.model.language_model.layers[2:], device="cuda:1")
    devices = [devices_of(layer) for layer in decoder_layers(model)]
    assert [len(each) for each in devices] == [1] * 4 and devices[0] == devices[1] != devices[2] == devices[3]
    assert "not on one device" in (sequential_reason(model) or "")
    # A device without a number is the current one.
    offload(model.model.language_model.layers[:2], device="cuda")
    assert devices_of(decoder_layers(model)[0]) == {torch.device("cuda:0")}
    offload(model.model.language_model.layers[1].self_attn.v_proj, device="cuda:1")
    with pytest.raises(ValueError, match=r"^layers: expected the attention of a layer on one device, layer 1 has"):
        capture_attention(model, layers=[1, 2])
    capture_attention(model, layers=[0, 2, 3])


def test_a_chain_of_hooks_is_read() -> None:
    model = tiny_llava()[0]
    offload(model)
    for module in model.modules():
        hook = module.__dict__.get("_hf_hook")
        if hook is not None:
            chain = type("SequentialHook", (), {"__module__": "accelerate.hooks"})()
            chain.hooks = (type("ModelHook", (), {"__module__": "accelerate.hooks"})(), hook)
            module.__dict__["_hf_hook"] = chain
    assert input_device(model) == torch.device("cpu") and sequential_reason(model) is None


def test_a_subclass_of_accelerates_hook_is_foreign_code() -> None:
    model = tiny_llava()[0]
    offload(model)
    layer = model.model.language_model.layers[1]
    layer.mlp.up_proj._hf_hook.__class__ = type("Steers", (type(layer.mlp.up_proj._hf_hook),), {})
    assert "layers.1.mlp.up_proj" in (sequential_reason(model) or "")


def test_weights_without_a_device() -> None:
    model, processor = tiny_llava()
    model.to("meta")
    with pytest.raises(ValueError, match=r"^model: "):
        CarveEngine(model, processor, preset=PRESET)(PHOTO, QUESTION)


@pytest.mark.parametrize("outside", [True, False])
def test_a_forward_around_accelerates_is_foreign_code(outside: bool) -> None:
    model = tiny_llava()[0]
    layer: Any = model.model.language_model.layers[1].mlp.up_proj
    plain = layer.forward
    if not outside:
        layer.forward = lambda *args: plain(*args)
    offload(model)
    if outside:
        moved = layer.forward
        layer.forward = lambda *args: moved(*args)
    assert "layers.1.mlp.up_proj" in (sequential_reason(model) or "")


def test_accelerate_itself(tmp_path: Path) -> None:
    """Its own hooks, where it is installed: half of the layers on the CPU, half on a disk."""
    pytest.importorskip("accelerate", reason="`make quantised` installs it")
    expected = CarveEngine(*family("llava"), preset=PRESET)(PHOTO, QUESTION)
    model, processor = tiny_llava()
    folder = save(model, processor, tmp_path / "model")
    names = [name for name, module in model.named_modules() if any(True for _ in module.parameters(False))]
    places = {name: "disk" if ".layers.2." in name or ".layers.3." in name else "cpu" for name in names}
    places |= {"model.language_model.rotary_emb": "cpu"}
    spread = type(model).from_pretrained(folder, device_map=places, offload_folder=tmp_path / "weights").eval()
    assert spread.model.language_model.layers[2].mlp.up_proj.weight.device.type == "meta"
    inputs = inputs_for(processor, [PHOTO], [QUESTION])
    maps = []
    for each in (model, spread):
        with capture_attention(each, layers="all") as session:
            generate(each, inputs, steps=3)
        maps.append(session.maps.values)
    assert float((maps[1] - maps[0]).abs().max()) <= 1e-5 * float(maps[0].max())
    engine = CarveEngine(spread, processor, preset=PRESET)
    assert engine.sequential_reason is None
    assert engine(PHOTO, QUESTION).answer_ids == expected.answer_ids
