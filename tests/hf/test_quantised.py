"""Models with quantised weights, by bitsandbytes and torchao on the CPU: `make quantised` installs both."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf.inputs import build_prompt, prepare
from tests.support.families import FAMILIES, IMAGES, TEXTS, family, generate, inputs_of, visual
from tests.support.tiny_models import save

pytest.importorskip("accelerate")


def _bitsandbytes(**settings: Any) -> Any:
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**settings)


def _four_bits(kind: str, dtype: torch.dtype) -> Any:
    return _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)


def _torchao(name: str) -> Any:
    from transformers import TorchAoConfig

    pytest.importorskip("torchao")
    return TorchAoConfig(quant_type=getattr(importlib.import_module("torchao.quantization"), name)())


# The settings, and the type of weight whose activations are quantised by the whole tensor, or None.
KINDS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "bitsandbytes, 8 bits": (lambda: _bitsandbytes(load_in_8bit=True), "Linear8bitLt"),
    "bitsandbytes, nf4": (lambda: _four_bits("nf4", torch.float32), None),
    "bitsandbytes, fp4 in bfloat16": (lambda: _four_bits("fp4", torch.bfloat16), None),
    "torchao, int8": (lambda: _torchao("Int8WeightOnlyConfig"), None),
    "torchao, int8 from 4 to 8 bits": (lambda: _torchao("IntxWeightOnlyConfig"), None),
    "torchao, float8": (lambda: _torchao("Float8WeightOnlyConfig"), None),
    "torchao, int8 activations": (lambda: _torchao("Int8DynamicActivationInt8WeightConfig"), "Int8Tensor"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(*family(name), tmp_path_factory.mktemp(name)) for name in FAMILIES}


def load(kind: str, name: str, folder: Path) -> Any:
    settings = KINDS[kind][0]()
    model = type(family(name)[0]).from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    plain = type(family(name)[0].get_decoder().layers[0].mlp.up_proj.weight)
    layer = model.get_decoder().layers[0].mlp.up_proj
    assert type(layer) is not torch.nn.Linear or type(layer.weight) is not plain, "nothing was quantised"
    return model.eval()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_those_of_the_same_forwards(kind: str, name: str, checkpoints: dict[str, Path]) -> None:
    model, inputs = load(kind, name, checkpoints[name]), inputs_of(name, 3)
    # Under sdpa the activations differ in the last bits, which rounding them may widen.
    model.set_attn_implementation({"text_config": "eager"})
    plain = generate(model, inputs)
    with capture_attention(model, layers="all") as session:
        output = generate(model, inputs, output_attentions=True)
    maps, columns = session.maps, visual(model, inputs)
    assert torch.equal(output.sequences, plain.sequences) and bool(maps.valid[:, :, 0].all())
    for row in range(3):
        for step in maps.valid[row].all(0)[:, 0].nonzero()[:, 0].tolist():
            layers = [layer[row, :, -1, columns[row]].float().mean(0) for layer in output.attentions[step]]
            expected = torch.stack(layers)
            found = maps.values[row, :, step, 0, : len(columns[row])]
            assert float((found - expected).abs().max()) <= 1e-5 * float(expected.max())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_answers_as_generate(kind: str, name: str, checkpoints: dict[str, Path]) -> None:
    model, processor = load(kind, name, checkpoints[name]), family(name)[1]
    preset = Preset.paper(layers=(1, 2), max_new_tokens=4)
    engine = CarveEngine(model, processor, preset=preset)
    _, mixing = KINDS[kind]
    assert (engine.sequential_reason is None) == (mixing is None)
    assert mixing is None or mixing in str(engine.sequential_reason)
    inputs = prepare(processor, [IMAGES[0]], build_prompt(processor, TEXTS[0]), None, preset.max_pixels)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    for _ in range(2):
        result = engine(IMAGES[0], TEXTS[0])
        assert list(result.answer_ids) == ids.tolist()
    with capture_attention(model, layers=(1, 2)) as session, torch.no_grad():
        model(**inputs)
    expected = session.maps.values[0, :, 0]
    assert float((result.task.values[0, :, 0] - expected).abs().max()) <= (1e-4 if mixing is None else 1e-6)
    gc.collect()
