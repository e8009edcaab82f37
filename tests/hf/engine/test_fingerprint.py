"""The identity of models, checkpoints and images: the same for the same thing, another for whatever changes a map."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, load
from carve_kernels.hf.engine import fingerprint as module
from carve_kernels.hf.engine.fingerprint import SAMPLES, Unidentified, dense_tensors, digest, fingerprint, key_of
from tests.support.tiny_models import make_image, save, tiny_llava, tiny_qwen2_5_vl


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(*tiny_llava(), tmp_path_factory.mktemp("model"))


def change_one_weight_of_many(model: Any, processor: Any) -> None:
    # Small enough to be read whole.
    model.model.language_model.layers[3].input_layernorm.weight[5] += 1


def train(model: Any, processor: Any) -> None:
    weight = model.model.language_model.layers[2].mlp.down_proj.weight
    assert weight.numel() > SAMPLES
    weight.mul_(1.001)


def change_a_few_columns(model: Any, processor: Any) -> None:
    model.model.language_model.layers[2].mlp.down_proj.weight[:, 7:15] = 0


def change_one_element_that_is_not_sampled(model: Any, processor: Any) -> None:
    weight = model.model.language_model.layers[2].mlp.down_proj.weight
    sampled = set(module._sample_indices(weight.numel()).tolist())
    weight.view(-1)[next(place for place in range(weight.numel()) if place not in sampled)] += 1


def turn_more_slowly(model: Any, processor: Any) -> None:
    # In no state_dict.
    model.model.language_model.rotary_emb.inv_freq.mul_(0.5)


def swap_two_rows(model: Any, processor: Any) -> None:
    weight = model.model.language_model.embed_tokens.weight
    weight[[7, 8]] = weight[[8, 7]]


CHANGES: list[Callable[[Any, Any], Any]] = [
    change_one_weight_of_many,
    change_one_element_that_is_not_sampled,
    turn_more_slowly,
    swap_two_rows,
    train,
    change_a_few_columns,
    lambda model, processor: model.to(torch.bfloat16),
    lambda model, processor: model.set_attn_implementation({"text_config": "eager"}),
    lambda model, processor: model.set_attn_implementation({"vision_config": "eager"}),
    lambda model, processor: setattr(model.generation_config, "repetition_penalty", 1.1),
    lambda model, processor: model.train(),
    lambda model, processor: setattr(processor.image_processor, "image_mean", (0.25, 0.5, 0.5)),
    lambda model, processor: setattr(processor, "vision_feature_select_strategy", "full"),
    lambda model, processor: processor.tokenizer.add_tokens(["another"]),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_map_changes_the_identity(directory: Path, change: Callable[[Any, Any], Any]) -> None:
    model, processor = load(directory)
    before = fingerprint(model, processor)
    assert fingerprint(model, processor) == before
    with torch.no_grad():
        change(model, processor)
    assert fingerprint(model, processor) != before


def test_the_same_model_elsewhere_is_the_same(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "moved")
    assert fingerprint(*load(directory)) == fingerprint(*load(tmp_path / "moved"))
    assert fingerprint(*load(directory)) != fingerprint(*tiny_llava(seed=1))
    assert fingerprint(*load(directory)) != fingerprint(*tiny_qwen2_5_vl())


def test_weights_are_read_again_only_when_they_changed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda tensors: (calls.append(1) if tensors else None) or read(tensors))
    model, processor = load(directory)
    before = [fingerprint(model, processor) for _ in range(3)]
    assert len(calls) == 1 and len(set(before)) == 1
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert fingerprint(model, processor) != before[0] and len(calls) == 2
    with torch.inference_mode():
        frozen = torch.ones(3)
    model.model.register_buffer("made_in_inference_mode", frozen)
    assert len({fingerprint(model, processor) for _ in range(2)}) == 1


def test_images_are_known_by_their_pixels(tmp_path: Path) -> None:
    seen = make_image(40, 24, 1)
    seen.save(tmp_path / "one.png")
    shutil.copy(tmp_path / "one.png", tmp_path / "two.png")
    digests = {digest(Image.open(tmp_path / name)) for name in ("one.png", "two.png")}
    assert digests == {digest(seen)}
    other = seen.copy()
    other.putpixel((3, 3), (1, 2, 3))
    assert digest(other) != digest(seen)
    assert digest(Image.new("RGB", (6, 4))) != digest(Image.new("RGB", (4, 6)))


def test_keys() -> None:
    assert key_of(rows=("word", "red"), steps=1) == key_of(steps=1, rows=["word", "red"])
    assert key_of(steps=1) != key_of(steps="1") != key_of(step=1) and len(key_of()) == 64


def test_another_tensor_at_the_address_of_the_last_one_is_another(directory: Path) -> None:
    model, processor = load(directory)
    layer = model.model.language_model.layers[0].mlp
    width, depth = layer.up_proj.weight.shape
    found = set()
    for _ in range(8):
        layer.up_proj = None
        layer.up_proj = torch.nn.Linear(depth, width, bias=False)
        found.add(fingerprint(model, processor))
    assert len(found) == 8


def test_autocast_is_another_model(directory: Path) -> None:
    model, processor = load(directory)
    before = fingerprint(model, processor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fingerprint(model, processor) != before
    assert fingerprint(model, processor) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(5000,), (3, 1701), (70, 64), (9, 8, 77)])
def test_one_element_of_a_tensor_of_any_kind(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # A slice behind one element, whose memory begins at no word.
    tensor = torch.zeros(1 + torch.Size(shape).numel(), dtype=dtype)[1:].view(shape)
    before = module._read({"weight": tensor})
    for place in (0, 1, tensor.numel() // 2 + 1, tensor.numel() - 1):
        tensor.view(-1)[place] = 1
        assert module._read({"weight": tensor}) != before
        tensor.view(-1)[place] = 0
    assert module._read({"weight": tensor}) == before


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (9000, 1), (1, 9000), (130, 65)])
def test_tensors_of_any_shape_have_a_small_checksum(shape: tuple[int, ...]) -> None:
    strided = torch.randn(*shape, dtype=torch.complex64).real
    assert module._read({"a": strided}) == module._read({"a": strided.contiguous()})
    assert module._checksum(strided.reshape(-1).contiguous()).numel() == 1


def test_blocks_that_change_places_change_the_checksum() -> None:
    flat = torch.randn(64 * 64)
    swapped = flat.view(32, 128)[[1, 0, *range(2, 32)]].reshape(-1)
    assert int(module._checksum(flat)) != int(module._checksum(swapped))


def test_what_a_model_makes_for_its_state_is_part_of_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers quantised to four bits do."""
    model, processor = load(directory)
    layer = model.model.language_model.layers[0].mlp.up_proj
    state = {"scale": 1.0}

    def made(module: Any, entries: Any, prefix: str, _: Any) -> None:
        entries[f"{prefix}weight.quant_state"] = torch.tensor([state["scale"]])

    layer._register_state_dict_hook(made)
    calls: list[int] = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda tensors: calls.append(len(tensors)) or read(tensors))
    first = fingerprint(model, processor)
    assert fingerprint(model, processor) == first
    # The weights once, and what is made each time.
    assert sorted(calls)[:2] == [1, 1] and len(calls) == 3
    state["scale"] = 2.0
    assert fingerprint(model, processor) != first


def test_offloaded_weights_have_no_fingerprint(directory: Path) -> None:
    """Two models with different offloaded weights would have one fingerprint."""
    model, processor = load(directory)
    weight = model.model.language_model.layers[1].mlp.up_proj
    weight.weight = torch.nn.Parameter(weight.weight.to("meta"))
    with pytest.raises(Unidentified, match=r"layers\.1\.mlp\.up_proj\.weight"):
        fingerprint(model, processor)


class Halved(torch.Tensor):
    """A weight of two tensors and a number, as torchao's are: all that plain functions know of it is its shape."""

    low: torch.Tensor
    high: torch.Tensor

    @staticmethod
    def __new__(cls, low: torch.Tensor, high: torch.Tensor, scale: float) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, (2 * low.shape[0], *low.shape[1:]), dtype=torch.float32)

    def __init__(self, low: torch.Tensor, high: torch.Tensor, scale: float) -> None:
        self.low, self.high, self.scale = low, high, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["low", "high"], {"scale": self.scale}

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Halved(args[0].low, args[0].high, args[0].scale)
        raise NotImplementedError(function)


def halved(model: Any) -> Any:
    layer = model.model.language_model.layers[0].mlp.up_proj
    weight = layer.weight.detach()
    layer.weight = torch.nn.Parameter(Halved(*weight.mul(127).to(torch.int8).chunk(2), 2.0), requires_grad=False)
    return layer.weight


def test_a_weight_that_consists_of_others(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one, processor), (other, _) = load(directory), load(directory)
    weight = halved(one)
    before = fingerprint(one, processor)
    twin = halved(other)
    assert fingerprint(other, processor) == before
    twin.scale = 3.0
    assert fingerprint(other, processor) != before
    calls: list[int] = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda tensors: (calls.append(1) if tensors else None) or read(tensors))
    assert fingerprint(one, processor) == before and not calls
    weight.high[3, 3] += 1
    assert fingerprint(one, processor) != before and len(calls) == 1


def quantised(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8).eval()


def test_weights_that_a_layer_keeps_packed(directory: Path) -> None:
    """They are neither parameters nor buffers."""
    (one, processor), (other, _), (third, _) = load(directory), load(directory), load(directory)
    with torch.no_grad():
        other.model.language_model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    found = [fingerprint(quantised(model), processor) for model in (one, other, third)]
    assert found[0] == found[2] != found[1]


def per_tensor(values: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(values, 0.5, 3, torch.qint8)


def per_channel(values: torch.Tensor) -> torch.Tensor:
    scales, points = torch.full((len(values),), 0.5), torch.zeros(len(values), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_channel(values, scales, points, 0, torch.qint8)


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "quantised": per_tensor,
    "quantised by channels": per_channel,
    "sparse": lambda values: values.to_sparse(),
    "sparse rows": lambda values: values.to_sparse_csr(),
    "float8": lambda values: values.to(torch.float8_e4m3fn),
    "a subclass": lambda values: values.as_subclass(type("Params4bit", (torch.Tensor,), {})),
    "a list": lambda values: [values, None, 3, "text"],
    "a mapping": lambda values: {"inner": (values, torch.int8)},
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_any_kind_are_read(kind: str) -> None:
    values = torch.arange(12.0).view(3, 4)
    other = values.clone()
    other[2, 1] += 1

    def found(tensor: torch.Tensor) -> str:
        return module._read(dict(dense_tensors("weight", KINDS[kind](tensor))))

    assert found(values) == found(values.clone()) != found(other)


def test_what_is_said_beside_the_numbers_counts() -> None:
    values = torch.zeros(3, 4)

    def found(value: Any) -> str:
        return module._read(dict(dense_tensors("weight", value)))

    facts = [[values, 3], [values, 4], [values, "3"], [values], {"3": values}, values, values.to_sparse()]
    assert len({found(value) for value in [per_tensor(values), per_channel(values), *facts]}) == len(facts) + 2


def spread(values: torch.Tensor) -> Any:
    return values.as_subclass(type("DTensor", (torch.Tensor,), {}))


def partitioned(values: torch.Tensor) -> Any:
    """As DeepSpeed leaves a weight of which another process has the numbers."""
    empty = torch.nn.Parameter(values.new_empty(0))
    empty.ds_id = 3
    return empty


def freed(values: torch.Tensor) -> Any:
    values.untyped_storage().resize_(0)
    return values


def nameless(values: torch.Tensor) -> Any:
    def fail(_: Any) -> Any:
        raise RuntimeError("no numbers here")

    return values.as_subclass(type("Opaque", (torch.Tensor,), {"__tensor_flatten__": fail}))


@pytest.mark.parametrize(
    "value", [spread, partitioned, freed, nameless, lambda values: values.to("meta"), lambda _: object()]
)
def test_what_cannot_be_read_is_no_identity(value: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(Unidentified, match=r"weight\[1\]"):
        list(dense_tensors("weight", [3, value(torch.zeros(3))]))


def test_a_module_that_holds_no_weights_counts(directory: Path) -> None:
    model, processor = load(directory)
    before = fingerprint(model, processor)
    model.model.language_model.layers[1].mlp.act_fn = torch.nn.ReLU()
    assert fingerprint(model, processor) != before


def test_a_model_without_an_identity_is_not_remembered(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = load(directory)

    def packed(module: Any, entries: Any, prefix: str, _: Any) -> None:
        entries[f"{prefix}packed"] = object()

    model.model.language_model.layers[1].mlp.up_proj._register_state_dict_hook(packed)
    engine = CarveEngine(model, processor, preset=Preset.paper(layers=(1,), max_new_tokens=2))
    with caplog.at_level("INFO", logger="carve_kernels"):
        engine(make_image(80, 60), "hello")
    assert "nothing is cached" in caplog.text and "up_proj" in caplog.text and sum(engine.memory.held()) == 0
