"""A profile: what it entries at, what it picks on a trained model without a box, and who accepts what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf import decoding
from carve_kernels.hf.decoding import Decoder
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.loading import load
from carve_kernels.hf.model import decoder_layers
from carve_kernels.hf.profile import candidate_maps
from carve_kernels.hf.profile.candidate_maps import CandidateReader
from carve_kernels.hf.profile.profile import BadProbes, Probe, Profile, profile
from carve_kernels.models import small
from carve_kernels.models.scenes import LEVELS, draw_scene
from tests.support.families import IMAGES, family, state, watched
from tests.support.generation_kinds import Prompted, tokenizer_of_kind
from tests.support.tiny_models import make_image, save, tiny_llava
from tests.support.tolerances import relative

# Behind the seeds of training, validation and test.
SEED = 20_000_000
SHORT = Preset.paper(max_new_tokens=3)
ASKED = [
    Probe(IMAGES[0], "what digit is red", boxes=((20.0, 10.0, 60.0, 50.0),)),
    Probe(IMAGES[0], "where is the square", ("find the square",), ((70.0, 20.0, 95.0, 60.0),)),
    Probe(IMAGES[1], "hello"),
]


def scenes(count: int) -> list[Probe]:
    """Two questions about each of `count` scenes a level."""
    drawn = [draw_scene(SEED + seed, level) for level in LEVELS for seed in range(count)]
    return [
        Probe(scene.image, f"what digit is {digit.colour}", boxes=(digit.box,))
        for scene in drawn
        for digit in scene.digits[:2]
    ]


@pytest.fixture(scope="module")
def trained() -> Profile:
    return profile(*load(small(), dtype="float32"), scenes(2))


def reached(found: Profile, layer: int, steps: str, rows: Any, name: str) -> float:
    """A cell's share of what the best cell reaches."""
    cell = next(c for c in found.cells if (c.layer, c.steps, c.rows) == (layer, steps, rows))
    return getattr(cell, name) / max(getattr(other, name) for other in found.cells)


@pytest.mark.parametrize("name", ["pointing", "contrast_pointing", "mass"])
def test_the_pick_points_nearly_as_well_as_the_best_cell(trained: Profile, name: str) -> None:
    pick = trained.pick
    assert trained.boxes == trained.questions == 16 and trained.images == 8
    assert reached(trained, pick.layer, pick.steps, pick.rows, name) >= 0.9
    assert pick.pointing >= 0.9 and trained.doubt is None
    # Choosing decides: the worst cells do not point at all.
    assert min(cell.pointing for cell in trained.cells) < 0.3
    assert (trained.preset.layers, trained.preset.rows, trained.preset.steps) == ((pick.layer,), pick.rows, pick.steps)


def test_one_question_an_image_is_enough_and_no_box_is_seen(trained: Profile) -> None:
    blind = [Probe(probe.image, probe.question) for probe in scenes(1)[::2]]
    found = profile(*load(small(), dtype="float32"), blind, steps=("t_start", "t_end"))
    assert found.best_pointing is None and found.boxes == 0 and found.pick.pointing is None
    assert reached(trained, found.pick.layer, found.pick.steps, found.pick.rows, "pointing") >= 0.9


def test_everything_but_layers_rows_and_steps_is_the_models_own_profile(trained: Profile) -> None:
    own = Preset.from_dict(json.loads((small() / "carve.json").read_text()))
    assert trained.preset.general_prompt == own.general_prompt and trained.preset.lam == own.lam
    assert trained.preset.size == own.size and trained.preset.max_new_tokens == own.max_new_tokens


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_boxes_choose_nothing(name: str) -> None:
    model, processor = family(name)
    before = state(model)
    seen, blind = (
        profile(model, processor, [Probe(p.image, p.question, p.paraphrases, boxes) for p in ASKED], preset=SHORT)
        for p_boxes in (True, False)
        for boxes in [((0.0, 0.0, 30.0, 30.0),) if p_boxes else ()]
    )
    assert state(model) == before
    numbers = ("layer", "rows", "steps", "score", "departure", "entropy", "between", "within")
    assert [[getattr(cell, n) for n in numbers] for cell in seen.cells] == [
        [getattr(cell, n) for n in numbers] for cell in blind.cells
    ]
    assert seen.preset == blind.preset and seen.boxes == 3 and blind.boxes == 0
    assert all(cell.pointing is not None and 0 <= cell.mass <= 1 for cell in seen.cells)


def reader_of(name: str, rows: Any, steps: list[str], preset: Preset = SHORT) -> CandidateReader:
    return CandidateReader(*family(name), preset, rows, steps, "auto")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_one_prefill_gives_the_maps_of_every_choice(name: str, shared: bool, using: Any) -> None:
    model, processor = family(name)
    rows = ["last", "question", (-2,), 3, (-3, -2), ("word", "red"), ("text", "red")]
    texts = ["what digit is red", "the red square at the left", "is red a digit"]
    reader = reader_of(name, rows, ["t_start", "t_end"])
    before = state(model)
    decoders: list[Decoder] = []
    # Three in a batch, so that the last one continues the prefix cache of the first ones.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate_maps, "MAX_BATCH", 3)
        patch.setattr(candidate_maps, "Decoder", lambda *args: decoders.append(Decoder(*args)) or decoders[-1])
        if not shared:
            patch.setattr(decoding, "sequential_reason", lambda _: "the test says so")
        general, *seen = reader.read(IMAGES[0], SHORT.general_prompt, texts)
    assert state(model) == before and [decoder.sequential_reason is None for decoder in decoders] == [shared]
    assert reader.layers == (0, 1, 2, 3) and len(seen) == 3
    for text, found in ((SHORT.general_prompt, general), *zip(texts, seen, strict=True)):
        inputs = prepare(processor, [IMAGES[0]], build_prompt(processor, text), None, SHORT.max_pixels)
        for row in rows:
            asked = "question" if found is general and row in (("word", "red"), ("text", "red")) else row
            session = capture_attention(model, layers="all", rows=asked, processor=processor, max_steps=3)
            with session, torch.no_grad():
                model.generate(**inputs, do_sample=False, max_new_tokens=3)
            expected = session.maps.values[0]
            expected = expected[:, : session.maps.last_step() + 1, -1] if row == "last" else expected[:, :1].mean(2)
            assert relative(found.maps[row], expected) < 5e-5, (text, row)
        assert sum(len(part.tokens) for part in found.views) == found.maps["last"].shape[-1]


def test_candidates_end_with_the_users_text() -> None:
    _, processor = family("llava")
    behind = len(processor.tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"])
    steps = ["t_start", "t_full"]
    reader = reader_of("llava", None, steps)
    assert reader.rows == ["last", "question", *((-(behind + place),) for place in (1, 2, 3, 4))]
    assert [choice for choice in reader.choices if choice.steps == "t_full"] == [("last", "t_full")]
    suffix = Preset.paper(suffix=" in one word", max_new_tokens=2)
    more = len(processor.tokenizer(" in one word", add_special_tokens=False)["input_ids"])
    assert reader_of("llava", None, steps, suffix).rows[2] == (-(behind + more + 1),)


@pytest.mark.parametrize("kind", ["byte-level", "llama", "always"])
def test_candidates_are_counted_in_a_prompt(kind: str) -> None:
    model, processor = tiny_llava()
    processor.tokenizer = tokenizer_of_kind(kind)
    for suffix in ("", " in one word"):
        preset = Preset.paper(general_prompt="what color is the cat", suffix=suffix, max_new_tokens=2)
        reader = CandidateReader(model, processor, preset, None, ["t_start"], "auto")
        prompted = Prompted(processor.tokenizer, build_prompt(processor, preset.general_prompt + suffix))
        end = prompted.text.index("cat") + len("cat")
        last = prompted.columns(end - 1, end)[-1] - prompted.ids.shape[1]
        assert reader.rows[2:] == [(last - place,) for place in range(4)]


def test_rows_that_a_prompt_lacks_are_left_out_or_refused() -> None:
    model, processor = family("llava")
    short = Preset.paper(max_new_tokens=2, general_prompt="hi")
    found = profile(model, processor, ASKED[:1], preset=short, steps=["t_start"])
    candidates = reader_of("llava", None, ["t_start"], short).rows
    assert {cell.rows for cell in found.cells} < set(candidates)
    with pytest.raises(ValueError, match=r"rows: expected rows after the image, got \(-30,\)"):
        profile(model, processor, ASKED[:1], preset=short, rows=["last", (-30,)])


@pytest.mark.parametrize(("steps", "forwards"), [(["t_start"], 1), (["t_start", "t_end"], 3)])
def test_an_image_is_read_once_for_all_prompts(steps: list[str], forwards: int) -> None:
    model, processor = family("llava")
    towers: list[Any] = []
    layers: list[int] = []
    reported: list[tuple[str, int, int]] = []
    with (
        watched(model.model.vision_tower, after=lambda *_: towers.append(1)),
        watched(decoder_layers(model)[3], before=lambda given, _: layers.append(given[0].shape[1])),
    ):
        profile(model, processor, ASKED, preset=SHORT, steps=steps, on_progress=lambda *words: reported.append(words))
    assert len(towers) == 2
    assert len(layers) == 2 * forwards
    # After the image each prompt has its own tokens, and each answer one a forward: six prompts, then four.
    assert [length for length in layers if length < 10] == [6] * (forwards - 1) + [4] * (forwards - 1)
    assert reported == [("image", 0, 2), ("image", 1, 2), ("done", 2, 2)]


def test_what_is_written_is_accepted(tmp_path: Path) -> None:
    model, processor = family("llava")
    found = profile(model, processor, ASKED, preset=Preset.release(layers=(1, 2), max_new_tokens=3))
    path = tmp_path / "carve.json"
    found.save(path, versions={"torch": torch.__version__})
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert Preset.from_dict(values) == found.preset
    assert values["preset"] == "release" and values["layers"] == [found.pick.layer]
    evidence = values["evidence"]
    assert evidence["pick"] == evidence["cells"][0] and len(evidence["cells"]) == len(found.cells)
    assert evidence["versions"] == {"torch": torch.__version__} and evidence["questions"] == 3
    assert CarveEngine(model, processor, profile=path).preset == found.preset
    folder = save(*tiny_llava(), tmp_path / "model")
    path.rename(folder / "carve.json")
    assert CarveEngine(*load(folder)).preset == found.preset
    with pytest.raises(ValueError, match="'evidances'"):
        Preset.from_dict({"evidances": {}})


def test_weights_of_other_steps_and_layers_are_not_kept() -> None:
    model, processor = family("llava")
    base = Preset.paper(
        layers=(0, 1), layer_weights=(1.0, 2.0), steps="t_full", step_weights=(1.0, 1.0), max_new_tokens=3
    )
    found = profile(model, processor, ASKED, preset=base)
    assert found.preset.layer_weights is None
    assert found.preset.step_weights == (base.step_weights if found.pick.steps == "t_full" else None)
    assert CarveEngine(model, processor, preset=found.preset)(IMAGES[0], "what digit is red").saliency.any()


def test_a_pick_that_is_a_guess_says_so() -> None:
    model, processor = family("llava")
    # The other wording of each question is the other question, so that no map follows the one and not the other.
    same = [Probe(IMAGES[0], text, (other,)) for text, other in (("hello", "what"), ("what", "hello"))]
    guess = profile(model, processor, same, preset=SHORT, steps=["t_start"])
    assert guess.pick.score == pytest.approx(0, abs=1e-6)
    assert (guess.doubt is not None) == (guess.pick.score <= 0)
    # The same question again adds nothing, and does not count as another question.
    once, twice = (profile(model, processor, [ASKED[0]] * count, preset=SHORT) for count in (1, 2))
    assert (once.pick.layer, once.pick.rows, once.pick.steps) == (twice.pick.layer, twice.pick.rows, twice.pick.steps)
    assert once.pick.score == pytest.approx(twice.pick.score, rel=1e-4) and once.doubt is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"probes": []}, ValueError, "probes: expected at least one question"),
        ({"probes": "hello"}, TypeError, "probes: expected a list"),
        ({"probes": ["hello"]}, TypeError, r"probes\[0\]: expected a Probe"),
        ({"probes": [Probe("missing.png", "hello")]}, ValueError, "missing.png is missing"),
        ({"rows": []}, ValueError, "rows: expected 'last' among the rows for steps"),
        ({"rows": ["first"]}, ValueError, "rows: expected one of 'last', 'question'"),
        ({"rows": [("words", "red")]}, ValueError, r"rows\[0\]: expected 'last', 'question', \('word', WORD\)"),
        ({"rows": [("word", ["red", "blue"])]}, TypeError, "rows: expected one choice for every prompt in a preset"),
        ({"rows": [("text", " ")]}, ValueError, r"rows\[1\]"),
        ({"rows": ["question"], "steps": ["t_end"]}, ValueError, "rows: expected 'last' among the rows for steps"),
        ({"steps": ["t_middle"]}, ValueError, r"steps\[0\]: expected one of"),
        ({"steps": "t_start"}, TypeError, "steps: expected a list"),
        ({"backend": "gpu"}, ValueError, "backend"),
        ({"max_image_pixels": 10}, ValueError, "at most 10 are opened"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, processor = family("llava")
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises(error, match=message):
            profile(model, processor, **{"probes": ASKED, "preset": SHORT, **arguments})
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": 7}, TypeError, "image: expected a path or a PIL image"),
        ({"question": " "}, ValueError, "question"),
        ({"paraphrases": "hello"}, TypeError, "paraphrases: expected a list"),
        ({"paraphrases": [""]}, ValueError, r"paraphrases\[0\]"),
        ({"boxes": [[1, 2, 3]]}, ValueError, r"boxes\[0\]: expected \(x0, y0, x1, y1\)"),
        ({"boxes": [[5, 2, 3, 4]]}, ValueError, r"boxes\[0\]: expected \(x0, y0, x1, y1\)"),
        ({"boxes": [[0, 0, math.inf, 4]]}, ValueError, r"boxes\[0\]\[2\]: expected a finite number"),
    ],
)
def test_bad_probes_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Probe(**{"image": IMAGES[0], "question": "hello", **arguments})


def test_all_that_cannot_be_asked_is_named_at_once() -> None:
    model, processor = family("qwen2_5_vl")
    sizes = {(90, 60): "hello", (5000, 1): "hello", (9, 9): "<|image_pad|>"}
    probes = [Probe(make_image(*size), question) for size, question in sizes.items()]
    with pytest.raises(BadProbes, match=r"probes\[1\]: images: the processor refuses .*; probes\[2\]: text") as caught:
        profile(model, processor, probes)
    assert [place for place, _ in caught.value.faults] == [1, 2]
