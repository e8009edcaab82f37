"""FastV: answers and maps of real model classes equal eager attention that hides what it drops, or an error."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.frontends.pruning import FastV
from carve_kernels.hf.model import decoder_layers
from carve_kernels.types import Capture
from tests.support.dropping import generate_hiding
from tests.support.families import IMAGES, TEXTS, family, generate, in_eager, inputs_of, state, visual
from tests.support.processors.kinds import pair
from tests.support.zoo.kinds import build, kinds

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fastv.py"
NEW = 3
ADDS = "of which the decoder adds deepstack"
RECURRENT = "has no softmax attention"
WINDOW = "has a window, which counts keys"
# Why the kinds of the zoo are refused; all others must be right.
REFUSED = {
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "granite4_vision", "granite_docling"), ADDS),
    **dict.fromkeys(("cohere_compass", "cosmos3_omni"), ADDS),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp", "lfm3_vl", "lfm2_vl", "nemotron_h_omni"), RECURRENT),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), RECURRENT),
    **dict.fromkeys(("exaone4_5", "muse_glimmer", "gemma3", "gemma4", "gemma4_e", "gemma4_unified"), WINDOW),
    **dict.fromkeys(("aya_vision", "cohere2_vision", "llama4", "muse_spark"), WINDOW),
    "mistral_large4": "selects keys in blocks",
    "gemma3n": "attends to the keys of an earlier layer",
    **dict.fromkeys(("blip_2", "instructblip_image", "instructblip_video"), "open the session on the language model"),
}
# In seconds: a grid and a mrope, tiles with separators, masks in blocks, experts, and one refusal of each kind.
QUICK = ("llava", "qwen2_5_vl", "glm4v", "idefics3", "paligemma", "molmo2", "aria", "fuyu")
QUICK += ("qwen3_vl", "lfm2_vl", "gemma3", "gemma3n", "blip_2")
# The kind whose activations differ more under sdpa, also where nothing is dropped.
WIDER = {"minimax_m3_vl": 1e-4}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name, kind in kinds().items()
        if kind.exists() and kind.refused is None
    ],
)
def test_answers_and_maps_of_each_kind_or_why_not(name: str) -> None:
    model, inputs, columns = build(name)
    k = min(2, len(decoder_layers(model)) - 1)

    def pruned() -> tuple[Any, Any, FastV]:
        with (
            FastV(model, k=k, tokens=columns) as fastv,
            capture_attention(model, layers="all", tokens=columns) as session,
            torch.no_grad(),
        ):
            output = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            return output, session.maps, fastv

    if name in REFUSED:
        with pytest.raises(ValueError, match=f"^model: .*{REFUSED[name]}"):
            pruned()
        return
    output, maps, fastv = pruned()
    visual_columns, count = torch.tensor(columns), round(len(columns) / 2)
    eager = build(name)[0]
    eager.set_attn_implementation("eager")

    def choose(layer: int, rows: torch.Tensor) -> list[list[int]] | None:
        if layer != k - 1:
            return None
        best = rows[0, :, visual_columns].mean(0).topk(count).indices
        return [sorted({*columns} - {*visual_columns[best].tolist()})]

    expected = generate_hiding(eager, inputs, choose, NEW)
    assert torch.equal(output.sequences, expected.sequences)
    for logits, other in zip(output.logits, expected.logits, strict=True):
        assert float((logits - other).abs().max() / other.abs().max()) < 1e-5
    assert fastv.kept is not None and int((fastv.kept >= 0).sum()) == count
    for index, layer in enumerate(maps.layers):
        gone = expected.missing_in(layer, 0, visual_columns)
        assert int(gone.sum()) == (len(columns) - count if layer >= k else 0)
        for step in maps.steps:
            there, value = expected.map_of(layer, step, 0, visual_columns), maps.values[0, index, step, 0]
            assert float((value - there).abs().max() / there.max()) < WIDER.get(name, 1e-5)
            assert torch.equal(maps.missing[0, index, step, 0], gone)


@pytest.mark.parametrize(("k", "r"), [(1, 0.3), (2, 0.75), (3, 0.5), (2, 1.0), (2, 0)])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_how_many_are_dropped_where_in_a_padded_batch(name: str, k: int, r: float) -> None:
    """Each image of Qwen's batch has another number of tokens."""
    model, inputs = family(name)[0], inputs_of(name, 3)
    columns = visual(model, inputs)
    before = state(model)
    with FastV(model, k=k, r=r) as fastv:
        output = generate(model, inputs)
    assert state(model) == before

    def choose(layer: int, rows: torch.Tensor) -> list[list[int]] | None:
        if layer != k - 1:
            return None
        gone = []
        for row, each in enumerate(columns):
            best = rows[row, :, each].mean(0).topk(round(len(each) * (1 - r))).indices
            gone.append(sorted({*each.tolist()} - {*each[best].tolist()}))
        return gone

    expected = generate_hiding(in_eager(name), inputs, choose, 5)
    assert torch.equal(output.sequences, expected.sequences)
    for logits, other in zip(output.logits, expected.logits, strict=True):
        assert float((logits - other).abs().max() / other.abs().max()) < 1e-5
    assert fastv.kept is not None
    for row, each in enumerate(columns):
        assert {*each.tolist()} - {*expected.dropped[k - 1][row]} == {*fastv.kept[row].tolist()} - {-1}


def test_equal_tokens_are_kept_from_the_first_on() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    columns = visual(model, inputs)[0]
    fastv = FastV(model, r=0.5)
    with fastv:
        generate(model, inputs, steps=1)
        assert fastv._keep(1, 0, Capture(torch.ones(1, 1, 36), torch.ones(1, 1), torch.ones(1, 1))) is not None
    assert fastv.kept is not None and fastv.kept[0].tolist() == [*columns[:18].tolist(), *[-1] * 18]


def test_an_engine_answers_without_the_tokens() -> None:
    """Its maps must be of the whole image: layers behind are refused, those before are not."""
    model, processor = family("llava")
    engine = CarveEngine(model, processor, preset=Preset(layers=[0, 1], max_new_tokens=4))
    plain = engine.ask(IMAGES[0], TEXTS[0])
    with FastV(model, r=1.0):
        blind = engine.ask(IMAGES[0], TEXTS[0])
    with FastV(model), pytest.raises(ValueError, match=r"^layers: expected a layer that sees the whole image"):
        CarveEngine(model, processor, preset=Preset(layers=[2])).ask(IMAGES[0], TEXTS[0])
    assert blind.answer != plain.answer


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "k of no layer": (ValueError, "k: expected an integer from 1 to 3, got int 0", {"k": 0}),
    "k of all layers": (ValueError, "k: expected an integer from 1 to 3, got int 4", {"k": 4}),
    "k of another type": (TypeError, "k: expected an integer", {"k": 2.0}),
    "r above 1": (ValueError, "r: expected a number from 0 to 1, got float 1.5", {"r": 1.5}),
    "r not finite": (ValueError, "r: expected a finite number", {"r": float("nan")}),
    "r of another type": (TypeError, "r: expected a number", {"r": "half"}),
    "tokens": (TypeError, "tokens: expected a VisualLayout", {"tokens": "all"}),
    "backend": (ValueError, "backend: expected one of", {"backend": "cpp"}),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_name_the_argument(kind: str) -> None:
    error, message, arguments = ERRORS[kind]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        FastV(family("llava")[0], **arguments)


def test_models_are_checked_before_a_forward() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a transformers model, got str"):
        FastV("llava")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^k: expected layer k - 1 to have softmax attention, layer 0 has not"):
        FastV(build("lfm2_vl")[0], k=1)
    with pytest.raises(ValueError, match=r"^model: expected one whose layers behind layer 1 can process .* deepstack"):
        FastV(build("qwen3_vl")[0])
    fastv = FastV(family("llava")[0])
    with fastv:
        pass
    with pytest.raises(RuntimeError, match=r"^session: expected a new session"), fastv:
        pass


def test_the_example(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    main(["--scenes", "2"])
    lines = capsys.readouterr().out.splitlines()
    kept = [
        re.match(r"r=(\S+) +(\d+) keys up to layer 1, (\d+) behind .* [012] of 2 right", line) for line in lines[:5]
    ]
    assert [match[1] for match in kept if match] == ["0.0", "0.25", "0.5", "0.75", "0.9"]
    assert [(match[2], match[3]) for match in kept if match] == [
        ("150", behind) for behind in ("150", "114", "78", "42", "20")
    ]
    assert len(lines) == 5 + 12 and sum(line.count("#") for line in lines[5:]) == 72
    model, processor = pair("qwen2_5_vl")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    IMAGES[0].save(tmp_path / "image.png")
    main(["--model", str(tmp_path / "model"), "--image", str(tmp_path / "image.png"), "--k", "1", "--new", "2"])
    assert "keys up to layer 0" in capsys.readouterr().out


def test_padding_on_the_right_and_embeddings() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 3)
    ids, mask = (inputs[name].clone() for name in ("input_ids", "attention_mask"))
    for row in range(3):
        pads = int((mask[row] == 0).sum())
        ids[row], mask[row] = ids[row].roll(-pads), mask[row].roll(-pads)
    right = {**inputs, "input_ids": ids, "attention_mask": mask}
    columns, embeddings = visual(model, right), []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, given: embeddings.append(given["inputs_embeds"]), with_kwargs=True
    )
    outputs, kept = [], []
    for given in (inputs, right):
        with FastV(model) as fastv, torch.no_grad():
            outputs.append(model(**given).logits)
            kept.append(fastv.kept)
    hook.remove()
    with FastV(model, tokens=torch.stack(columns)), torch.no_grad():
        embedded = model(inputs_embeds=embeddings[1], attention_mask=mask).logits
    assert torch.allclose(embedded, outputs[1], rtol=1e-4, atol=1e-5)
    for row in range(3):
        expected, last = outputs[0][row, -1], outputs[1][row, int(mask[row].sum()) - 1]
        assert float((last - expected).abs().max() / expected.abs().max()) < 1e-5
        pads = int((mask[row] == 0).sum())
        assert torch.equal(torch.where(kept[1][row] < 0, -1, kept[1][row] + pads), kept[0][row])


def test_a_loss_of_the_text_reaches_the_first_layer() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    weight = decoder_layers(model)[0].self_attn.q_proj.weight  # type: ignore[union-attr]
    with FastV(model):
        output = model(**inputs, labels=labels)
    [gradient] = torch.autograd.grad(output.loss, weight)  # type: ignore[arg-type]
    with torch.no_grad():
        plain = model(**inputs, labels=labels)
    assert output.logits.shape == plain.logits.shape and bool(gradient.isfinite().all()) and bool(gradient.any())
    assert 0 < abs(float(output.loss.detach() - plain.loss)) < 1
