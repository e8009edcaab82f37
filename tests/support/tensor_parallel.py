"""Checks in two processes that share a model's heads, by gloo on the CPU; test_tensor_parallel.py runs `main`.

One process imports everything and is forked into both. Each writes a line for each check to FOLDER, the name and why it
failed, or None. They run the same checks in the same order, since all of the model's forwards wait for each other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf import head_shares
from carve_kernels.hf.decoding import sequential_reason
from carve_kernels.hf.head_shares import HeadShares
from carve_kernels.maps import AttentionMaps, new_buffers
from carve_kernels.numerics import entropy
from carve_kernels.types import Capture
from tests.support.families import FAMILIES, IMAGES, TEXTS, generate, inputs_of, visual
from tests.support.zoo import kinds

PROCESSES, SECONDS = 2, 200
ZOO = ("gemma3", "qwen3_5")
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def divided(model: Any) -> Any:
    """A model divided by its own plan, as `from_pretrained(tp_plan="auto")` does, which needs accelerate."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    # A weight that is used twice is divided twice, unless a checkpoint is loaded into it.
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    config = DistributedConfig(tp_plan="auto", tp_size=PROCESSES)
    parallel = type(model).maybe_distribute_model(model, config, initialize_distributed_mesh(config)[1])
    local = parallel.get_decoder().layers[-1].self_attn.o_proj.weight.to_local()
    assert local.shape[1] * PROCESSES == model.config.get_text_config().hidden_size
    return parallel


def pair(name: str) -> tuple[Any, Any, Any]:
    """A model in this process, the same model divided among both, and the processor."""
    model, processor = FAMILIES[name]()
    return model, divided(FAMILIES[name]()[0]), processor


def agree(found: AttentionMaps, expected: AttentionMaps) -> None:
    assert (found.layers, found.steps) == (expected.layers, expected.steps)
    assert torch.equal(found.valid, expected.valid) and bool(expected.valid.any())
    for name in ("values", "mass", "entropy"):
        difference = (getattr(found, name) - getattr(expected, name)).abs().max()
        assert float(difference) <= 1e-5 * float(getattr(expected, name).max()), (name, float(difference))
    # All processes have the same numbers to the bit, so that engines cut the same region.
    others = [torch.empty_like(found.values) for _ in range(PROCESSES)]
    distributed.all_gather(others, found.values)
    assert all(torch.equal(other, found.values) for other in others)


@check
def generated_maps() -> None:
    for name in ("llava", "qwen2_5_vl"):
        model, parallel, _ = pair(name)
        answers, maps = [], []
        for each in (model, parallel):
            with capture_attention(each, layers="all") as session:
                answers.append(generate(each, inputs_of(name, 3)).sequences)
            maps.append(session.maps)
        assert torch.equal(*answers)
        agree(maps[1], maps[0])


@check
def words_of_each_prompt() -> None:
    model, parallel, processor = pair("llava")
    maps = []
    for each in (model, parallel):
        options: Any = {"rows": ("word", ["digit", "left", "hello"]), "processor": processor}
        with capture_attention(each, layers=[1, 3], **options) as session, torch.no_grad():
            each(**inputs_of("llava", 3))
        maps.append(session.maps)
    agree(maps[1], maps[0])


@check
def kinds_of_the_zoo() -> None:
    for name in ZOO:
        maps = []
        for divide in (False, True):
            model, inputs, columns = kinds.build(name)
            model = divided(model) if divide else model
            with capture_attention(model, layers=[1, 3], tokens=columns) as session, torch.no_grad():
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
            maps.append(session.maps)
        agree(maps[1], maps[0])


@check
def layers_as_they_run() -> None:
    model, parallel, _ = pair("llava")
    captured: list[dict[tuple[int, int], Capture]] = [{}, {}]
    for each, seen in zip((model, parallel), captured, strict=True):

        def on_layer(layer: int, step: int, capture: Capture, seen: Any = seen) -> None:
            seen[layer, step] = Capture(*(part.clone() for part in capture))

        with capture_attention(each, layers=[0, 2], on_layer=on_layer):
            generate(each, inputs_of("llava", 1), steps=2)
    assert captured[0].keys() == captured[1].keys() and len(captured[0]) == 4
    for place, expected in captured[0].items():
        for one, other in zip(captured[1][place], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@check
def a_part_of_a_divided_model() -> None:
    """The group is found at the weights, also where the model that was divided is around the one of the session."""
    model, parallel, _ = pair("llava")
    inputs = inputs_of("llava", 1)
    maps = []
    for each in (model, parallel):
        text = each.model.language_model
        embeds = each.get_input_embeddings()(inputs["input_ids"])
        columns = visual(model, inputs)[0]
        with capture_attention(text, layers="all", tokens=columns) as session, torch.no_grad():
            text(inputs_embeds=embeds)
        maps.append(session.maps)
    agree(maps[1], maps[0])


@check
def a_refused_prompt() -> None:
    model, parallel, _ = pair("llava")
    maps = []
    for each in (model, parallel):
        with capture_attention(each, layers="all") as session, torch.no_grad():
            with suppress(ValueError):
                each(input_ids=torch.tensor([[20, 21, 22]]))
                raise AssertionError("a prompt without an image was not refused")
            each(**inputs_of("llava", 1))
            maps.append(session.maps)
    agree(maps[1], maps[0])


@check
def an_error_in_one_process() -> None:
    """Reading maps waits for no other process."""
    model, parallel, _ = pair("llava")
    with capture_attention(model, layers="all") as single:
        generate(model, inputs_of("llava", 1))
    with suppress(KeyError), capture_attention(parallel, layers="all") as session:
        generate(parallel, inputs_of("llava", 1))
        if distributed.get_rank():
            raise KeyError("of this process only")
        expected = single.maps.values
        assert float((session.maps.values - expected).abs().max()) <= 1e-5 * float(expected.max())
    distributed.barrier()
    agree(session.maps, single.maps)


@check
def an_engine() -> None:
    model, parallel, processor = pair("llava")
    preset = Preset.paper(layers=(1, 2), max_new_tokens=3)
    assert sequential_reason(parallel) == "it is tensor parallel: its heads are divided among processes"
    results = [CarveEngine(each, processor, preset=preset)(IMAGES[0], TEXTS[0]) for each in (model, parallel)]
    for name in ("answer_ids", "refined_ids", "box"):
        assert getattr(results[0], name) == getattr(results[1], name)
    agree(results[1].task, results[0].task)


@check
def shares_of_two_sizes() -> None:
    """The mean over one head here and two there, at one step and two of three layers."""
    rank, generator = distributed.get_rank(), torch.Generator().manual_seed(3)
    heads = torch.rand(2, 3, 2, 1, 5, generator=generator)
    tokens = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 5, 6, -1]], dtype=torch.int32)
    heads[:, :, 1, :, 4] = 0
    mine = heads[:, :1] if rank == 0 else heads[:, 1:]
    out = new_buffers((4, 3, 2, 1), 5, torch.device("cpu"))
    out.maps[2, 1:] = mine.mean(1)
    HeadShares(distributed.group.WORLD, 3).average(out, torch.tensor(2), 1, 2, mine.shape[1], tokens)
    expected = heads.mean(1)
    torch.testing.assert_close(out.maps[2, 1:], expected)
    torch.testing.assert_close(out.mass[2, 1:], expected.sum(-1))
    torch.testing.assert_close(out.entropy[2, 1:], torch.stack([entropy(each, tokens >= 0) for each in expected]))
    assert not out.maps[[0, 1, 3]].any() and bool((out.mass[2, 0] == -1).all())


@check
def an_unknown_group() -> None:
    _, parallel, _ = pair("llava")
    with mock.patch.object(head_shares, "tensor_parallel_group", lambda module: None):
        session = capture_attention(parallel, layers=[3])
    try:
        with session, torch.no_grad():
            parallel(**inputs_of("llava", 1))
    except ValueError as error:
        assert str(error).startswith("layers: layer 3 attends with 2 of its 4 heads in this process"), error
    else:
        raise AssertionError("a map of half of the heads was captured")
    distributed.barrier()


def run(rank: int, folder: Path) -> None:
    # A process that waits for another one that failed.
    signal.alarm(SECONDS)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    with (folder / f"{rank}.jsonl").open("w") as file:
        for name, function in CHECKS.items():
            error = None
            try:
                function()
            except Exception:
                error = traceback.format_exc()
            file.write(json.dumps([name, error]) + "\n")
            file.flush()
            if error is not None:
                # The other process may be ahead or behind.
                return


def main() -> None:
    processes = []
    for rank in range(PROCESSES):
        if (process := os.fork()) == 0:
            try:
                run(rank, Path(sys.argv[1]))
            finally:
                os._exit(0)
        processes.append(process)
    for process in processes:
        os.waitpid(process, 0)
