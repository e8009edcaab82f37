"""Several sessions, threads and interruptions: nothing is mixed up, and the model is restored."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from carve_kernels import capture_attention
from carve_kernels.hf.attention_patch import RECORDERS
from carve_kernels.hf.model import decoder_layers
from carve_kernels.hf.session.session import _add_recorder
from tests.support.families import STEPS, eager, family, generate, inputs_of, state
from tests.support.tiny_models import tiny_llava


def test_a_call_of_a_submodule_is_not_recorded() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with capture_attention(model, layers="all") as session, torch.no_grad():
        model(**inputs)
        before = session.maps
        model.model.language_model(input_ids=torch.arange(4, 30)[None])
    assert torch.equal(session.maps.values, before.values)


def test_nested_sessions_on_one_model_end_in_any_order() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    before = state(model)
    first, second = capture_attention(model, layers=[1]), capture_attention(model, layers=[1, 3])
    first.__enter__()
    second.__enter__()
    generate(model, inputs)
    expected = eager("llava", 1, "dynamic")[1]
    first.__exit__(None, None, None)
    generate(model, inputs, steps=2)
    second.__exit__(None, None, None)
    assert state(model) == before
    assert first.maps.steps == tuple(range(STEPS)) and second.maps.steps == (0, 1)
    assert torch.allclose(first.maps.values[:, 0, :, 0], expected[:, 1], rtol=1e-4, atol=1e-7)
    assert torch.allclose(second.maps.values[:, 1, :, 0], expected[:, 3, :2], rtol=1e-4, atol=1e-7)


def test_two_models_that_share_a_config_are_not_mixed_up() -> None:
    from transformers import LlavaForConditionalGeneration

    one = tiny_llava()[0]
    torch.manual_seed(7)
    other = LlavaForConditionalGeneration(one.config).eval()
    assert other.config is one.config
    inputs = inputs_of("llava", 1)
    with capture_attention(one, layers="all") as session:
        generate(other, inputs)
        with pytest.raises(RuntimeError, match="maps: expected a forward"):
            _ = session.maps
        generate(one, inputs)
        with capture_attention(other, layers="all") as of_other:
            generate(other, inputs)
    assert torch.allclose(session.maps.values[:, :, :, 0], eager("llava", 1, "dynamic")[1], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(of_other.maps.values, session.maps.values, rtol=0.1)


def test_two_threads_with_a_model_each() -> None:
    names = ("llava", "qwen2_5_vl")
    expected = {name: eager(name, 3, "dynamic")[1] for name in names}
    maps: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    start = threading.Barrier(2)

    def capture(name: str) -> None:
        start.wait()
        for _ in range(4):
            with capture_attention(family(name)[0], layers="all") as session:
                generate(family(name)[0], inputs_of(name, 3))
            maps[name].append(session.maps.values[:, :, :, 0])

    threads = [threading.Thread(target=capture, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert len(maps[name]) == 4
        assert all(torch.allclose(each, expected[name], rtol=1e-4, atol=1e-7) for each in maps[name])


def test_a_second_thread_on_one_model_is_refused() -> None:
    model, inputs = tiny_llava()[0], inputs_of("llava", 1)
    errors: list[Exception] = []

    def run(call: Any) -> None:
        def guarded() -> None:
            try:
                call()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join()

    with capture_attention(model, layers=[0]) as session, torch.no_grad():
        # Streamers generate in a worker thread while the main thread has the session.
        run(lambda: generate(model, inputs))
        assert not errors and session.maps.steps == tuple(range(STEPS))
        run(lambda: capture_attention(model, layers=[0]).__enter__())
        assert "another thread" in str(errors.pop())
        output = model(**inputs, use_cache=True)
        more = torch.tensor([[70]])
        run(lambda: model(input_ids=more, past_key_values=output.past_key_values))
        assert "another thread" in str(errors.pop())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_restored_after_an_interruption(
    using: Any, implementation: str, error: type[BaseException]
) -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    using(model, implementation)
    before = state(model)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error("in the middle of a step")

    hook = decoder_layers(model)[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(error, match="in the middle"), capture_attention(model, layers="all") as session:
        generate(model, inputs)
    hook.remove()
    assert state(model) == before
    # The steps before the third are complete.
    assert torch.allclose(
        session.maps.values[:, :, :, 0], eager("llava", 1, "dynamic")[1][:, :, :2], rtol=1e-4, atol=1e-7
    )
    with capture_attention(model, layers="all") as session:
        hook = decoder_layers(model)[2].mlp.register_forward_pre_hook(interrupt)
        calls.clear()
        with pytest.raises(error):
            generate(model, inputs)
        hook.remove()
        generate(model, inputs)
    assert state(model) == before
    assert torch.allclose(session.maps.values[:, :, :, 0], eager("llava", 1, "dynamic")[1], rtol=1e-4, atol=1e-7)


def test_an_interruption_while_a_recorder_is_added_leaves_none() -> None:
    class Interrupted(ExitStack):
        def callback(self, *_args: Any, **_options: Any) -> Any:
            raise KeyboardInterrupt

    module = torch.nn.Linear(1, 1)
    with pytest.raises(KeyboardInterrupt):
        _add_recorder(Interrupted(), module, (None, 0))  # type: ignore[arg-type]
    assert not hasattr(module, RECORDERS)
